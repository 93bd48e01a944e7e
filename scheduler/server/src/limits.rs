//! What a user may ask for. Every refusal names the field, the value and what would be right.

use bytesize::ByteSize;

/// Memory of an image that names none.
pub const DEFAULT_MEMORY_BYTES: u64 = 256 << 20;
const MIN_MEMORY_BYTES: u64 = 2 << 20;
const MAX_MEMORY_BYTES: u64 = 4 << 40;
const MAX_CPUS: u32 = 64;
const MAX_PRIORITY: u32 = 9;
/// Linux keeps 2,048 bytes of its command line, the last one a NUL.
const MAX_CMDLINE_BYTES: usize = 2047;
const MAX_ARGS: usize = 256;
const MAX_REASON_BYTES: usize = 200;

/// A value that is out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: '{value}' is not {expected}")]
pub struct FieldError {
    field: &'static str,
    value: String,
    expected: String,
}

impl FieldError {
    /// An error about a field; the value is cut to a readable length.
    pub fn new(field: &'static str, value: &str, expected: &str) -> Self {
        Self {
            field,
            value: shorten(value),
            expected: expected.to_owned(),
        }
    }
}

/// Cuts text from outside to what fits in a message.
pub fn shorten(text: &str) -> String {
    text.chars().take(300).collect()
}

/// A number of vCPUs.
pub fn cpus(cpus: u32) -> Result<(), FieldError> {
    max_cpus("cpus", cpus)
}

/// The same, of another field.
pub fn max_cpus(field: &'static str, cpus: u32) -> Result<(), FieldError> {
    if (1..=MAX_CPUS).contains(&cpus) {
        Ok(())
    } else {
        Err(FieldError::new(
            field,
            &cpus.to_string(),
            &format!("1 to {MAX_CPUS}"),
        ))
    }
}

/// A number of vCPUs of an image that uses no more than `most`.
pub fn at_most(field: &'static str, cpus: u32, most: u32) -> Result<(), FieldError> {
    if cpus <= most {
        return Ok(());
    }
    let expected = format!("at most {most}, the max_cpus of the image");
    Err(FieldError::new(field, &cpus.to_string(), &expected))
}

/// Why a VM is suspended, in a user's words.
pub fn suspend_reason(reason: &str) -> Result<(), FieldError> {
    if reason.len() <= MAX_REASON_BYTES && !reason.chars().any(char::is_control) {
        return Ok(());
    }
    let expected = format!("at most {MAX_REASON_BYTES} bytes without control characters");
    Err(FieldError::new(
        "reason",
        &reason.escape_debug().to_string(),
        &expected,
    ))
}

/// A VM's priority.
pub fn priority(priority: u32) -> Result<(), FieldError> {
    if priority <= MAX_PRIORITY {
        Ok(())
    } else {
        Err(FieldError::new(
            "priority",
            &priority.to_string(),
            &format!("0 to {MAX_PRIORITY}"),
        ))
    }
}

/// Guest memory.
pub fn memory_bytes(bytes: u64) -> Result<(), FieldError> {
    let size = ByteSize::b(bytes).to_string();
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) {
        return Err(FieldError::new("memory", &size, "2 MiB to 4 TiB"));
    }
    if bytes.is_multiple_of(4096) {
        Ok(())
    } else {
        Err(FieldError::new(
            "memory",
            &format!("{bytes} bytes"),
            "a multiple of 4096 bytes",
        ))
    }
}

/// A kernel command line: printable ASCII of bounded length.
pub fn cmdline(field: &'static str, text: &str) -> Result<(), FieldError> {
    if text.len() > MAX_CMDLINE_BYTES {
        let length = format!("{} bytes", text.len());
        return Err(FieldError::new(
            field,
            &length,
            &format!("at most {MAX_CMDLINE_BYTES} bytes of command line"),
        ));
    }
    if text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        Ok(())
    } else {
        Err(FieldError::new(field, text, "printable ASCII on one line"))
    }
}

/// A command line together with what is added to it.
pub fn cmdline_with(field: &'static str, line: &str, added: &str) -> Result<(), FieldError> {
    let length = line.len() + 1 + added.len();
    if length <= MAX_CMDLINE_BYTES {
        return Ok(());
    }
    let length = format!("{length} bytes");
    let expected =
        format!("at most {MAX_CMDLINE_BYTES} bytes of command line, that of [software_kvm] included");
    Err(FieldError::new(field, &length, &expected))
}

/// Name of an image.
pub fn image_name(name: &str) -> Result<(), FieldError> {
    let edge = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = (1..=128).contains(&name.len())
        && name.bytes().all(|byte| edge(byte) || b"._-".contains(&byte))
        && name.bytes().next().is_some_and(edge);
    if good {
        Ok(())
    } else {
        let expected = "1 to 128 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit";
        Err(FieldError::new("name", name, expected))
    }
}

/// The command line with the workload's arguments. With an initrd they go to init: after ` -- `, each percent-encoded.
/// A bare kernel gets them as they are.
pub fn cmdline_with_args(base: &str, has_initrd: bool, args: &[String]) -> Result<String, FieldError> {
    if args.len() > MAX_ARGS {
        let count = args.len().to_string();
        return Err(FieldError::new(
            "args",
            &count,
            &format!("at most {MAX_ARGS} arguments"),
        ));
    }
    let mut line = base.trim_end().to_owned();
    if has_initrd && !args.is_empty() {
        line.push_str(" --");
    }
    for arg in args {
        if !line.is_empty() {
            line.push(' ');
        }
        if has_initrd {
            percent_encode(arg, &mut line);
        } else {
            line.push_str(arg);
        }
        if line.len() > MAX_CMDLINE_BYTES {
            break;
        }
    }
    cmdline("args", &line)?;
    Ok(line)
}

fn percent_encode(arg: &str, line: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    if arg.is_empty() {
        // Two spaces would be one to the kernel. Init takes an encoded NUL for no byte at all.
        line.push_str("%00");
    }
    if arg == "--" {
        // The kernel takes a second one for the end of what init gets.
        line.push_str("%2D-");
        return;
    }
    for byte in arg.bytes() {
        if byte.is_ascii_graphic() && !b"%\"'\\".contains(&byte) {
            line.push(char::from(byte));
        } else {
            line.push('%');
            line.push(char::from(HEX[usize::from(byte >> 4)]));
            line.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_have_limits() {
        assert!(memory_bytes(2 << 20).is_ok() && memory_bytes(4 << 40).is_ok());
        assert_eq!(
            memory_bytes(0).expect_err("too small").to_string(),
            "memory: '0 B' is not 2 MiB to 4 TiB"
        );
        assert_eq!(
            memory_bytes(100 << 40).expect_err("too large").to_string(),
            "memory: '100.0 TiB' is not 2 MiB to 4 TiB"
        );
        assert!(memory_bytes((2 << 20) + 1).is_err());
        assert!(cpus(1).is_ok() && cpus(64).is_ok() && cpus(0).is_err() && cpus(65).is_err());
    }

    #[test]
    fn arguments_reach_init_encoded_and_a_bare_kernel_plain() {
        let args = ["sh".to_owned(), "-c".to_owned(), "echo \"100%\"; ü".to_owned()];
        let line = cmdline_with_args("console=ttyS0", true, &args).expect("fits");
        assert_eq!(line, "console=ttyS0 -- sh -c echo%20%22100%25%22;%20%C3%BC");
        let empty = ["printf".to_owned(), String::new()];
        assert_eq!(
            cmdline_with_args("q", true, &empty).expect("fits"),
            "q -- printf %00"
        );
        let dashes = ["sh", "--", "-", "---", "--"].map(str::to_owned);
        assert_eq!(
            cmdline_with_args("q", true, &dashes).expect("fits"),
            "q -- sh %2D- - --- %2D-"
        );
        let plain = ["wss=1MiB".to_owned(), "rate=5".to_owned()];
        assert_eq!(
            cmdline_with_args("", false, &plain).expect("fits"),
            "wss=1MiB rate=5"
        );
        assert_eq!(cmdline_with_args("quiet", true, &[]).expect("fits"), "quiet");
    }

    #[test]
    fn arguments_are_bounded() {
        let long = vec!["x".repeat(100); 30];
        assert!(cmdline_with_args("", true, &long).is_err());
        assert!(cmdline_with_args("", false, &vec![String::new(); 300]).is_err());
        assert!(cmdline_with_args("", false, &["a\nb".to_owned()]).is_err());
    }
}
