//! Breaks a ring-3 kernel from within: nothing protects it from its programs. It must notice, and say so.

use std::process::ExitCode;

/// The way out of such a kernel, which expects a frame on the stack.
const WAY_OUT: &str = "ring3_return";

/// Jumps there with a stack that is none. Returns only where there is no such kernel.
pub fn run() -> ExitCode {
    let symbols = match std::fs::read_to_string("/proc/kallsyms") {
        Ok(symbols) => symbols,
        Err(error) => {
            eprintln!("/proc/kallsyms: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Some(address) = symbols.lines().find_map(address) else {
        eprintln!("this kernel does not run in ring 3");
        return ExitCode::from(3);
    };
    println!("break-entry: jumping to {address:#x}");
    // SAFETY: it never comes back, so nothing of this program sees the stack pointer that it sets. That the kernel breaks is
    // what was asked for.
    unsafe {
        std::arch::asm!(
            "mov rsp, {stack}",
            "jmp {address}",
            stack = in(reg) 0xffff_c000_0000_0000_u64,
            address = in(reg) address,
            options(noreturn),
        )
    }
}

/// Of the way out, if the line is its.
fn address(line: &str) -> Option<u64> {
    let mut words = line.split_ascii_whitespace();
    let address = words.next()?;
    (words.nth(1)? == WAY_OUT).then(|| u64::from_str_radix(address, 16).ok())?
}
