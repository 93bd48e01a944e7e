//! `shoal-vmm --self-test`, as an agent calls it.

use std::process::{Command, Output};

const VMM: &str = env!("CARGO_BIN_EXE_shoal-vmm");

fn skipped() -> bool {
    let skip = std::env::var_os("SHOAL_SKIP_KVM").is_some();
    if skip {
        eprintln!("skipped without KVM");
    }
    skip
}

fn self_test(few_descriptors: bool) -> Output {
    let limit = if few_descriptors { "ulimit -n 4; " } else { "" };
    let script = format!("{limit}exec '{VMM}' --self-test");
    Command::new("sh")
        .args(["-c", &script])
        .output()
        .expect("a shell")
}

#[test]
fn one_line_of_json_says_how_guests_run_here() {
    if skipped() {
        return;
    }
    let output = self_test(false);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(text.lines().count(), 1, "{text}");
    let answer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(
        matches!(answer["kvm"].as_str(), Some("hardware" | "software")),
        "{text}"
    );
    assert_eq!(answer["ring3_kernel"], true, "{text}");
    assert!(
        answer["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("SYSCALL arrives")),
        "{text}"
    );
}

#[test]
fn where_no_vm_can_be_made_it_says_why_and_fails() {
    if skipped() {
        return;
    }
    let output = self_test(true);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.starts_with("shoal-vmm: self-test: KVM_CREATE_VM: ") && said.lines().count() == 1,
        "{said}"
    );
}
