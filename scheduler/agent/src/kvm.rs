//! How KVM runs guests here, as the VMM's self-test says: by it the kernel of a VM is chosen, and the scheduler compares nodes.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use crate::node::Node;

/// For the whole self-test, on a host with much else to do.
const LIMIT: Duration = Duration::from_secs(30);
/// Between two tests, and before one that has failed is believed.
const AGAIN: Duration = Duration::from_secs(30);
const ONCE_MORE: Duration = Duration::from_secs(1);
/// Of what a VMM says to explain itself.
const MAX_WORDS: usize = 300;

/// How a host's KVM runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KvmKind {
    /// By the CPU's virtualization.
    Hardware,
    /// Without: ring 0 is emulated.
    Software,
}

/// What is known of this host's KVM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostKvm {
    /// None: it cannot be used.
    pub(crate) kind: Option<KvmKind>,
    /// Why it cannot be used; or, without hardware virtualization, why kernels that run in ring 3 cannot run. Empty: nothing
    /// is wrong.
    pub(crate) trouble: String,
}

/// The line of JSON that `shoal-vmm --self-test` prints.
#[derive(Debug, Deserialize)]
struct SelfTest {
    kvm: KvmKind,
    ring3_kernel: bool,
    #[serde(default)]
    reason: String,
}

impl HostKvm {
    /// Has the VMM test it.
    pub(crate) async fn test(vmm_binary: &Path) -> Self {
        let tested = Command::new(vmm_binary)
            .arg("--self-test")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let why = match tokio::time::timeout(LIMIT, tested).await {
            Ok(Ok(output)) if output.status.success() => match serde_json::from_slice(&output.stdout) {
                Ok(answer) => return Self::of(&answer),
                Err(error) => format!("its self-test printed something else: {error}"),
            },
            Ok(Ok(output)) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let said = said.trim().trim_start_matches("shoal-vmm: ");
                match said {
                    "" => format!("its self-test ended with {}", output.status),
                    said => said.to_owned(),
                }
            }
            Ok(Err(error)) => format!("{}: {error}", vmm_binary.display()),
            Err(_) => format!("the self-test did not end within {} s", LIMIT.as_secs()),
        };
        Self {
            kind: None,
            trouble: shorten(&why),
        }
    }

    /// Warns of what is wrong.
    pub(crate) fn warn(&self) {
        let trouble = self.trouble.as_str();
        match self.kind {
            _ if trouble.is_empty() => {}
            None => tracing::warn!(
                trouble,
                "shoal-vmm --self-test: no VM can start on this node until that is mended; it is tested again"
            ),
            Some(_) => tracing::warn!(
                trouble,
                "shoal-vmm --self-test: images with a kernel for KVM without hardware virtualization cannot run on this node"
            ),
        }
    }

    fn of(answer: &SelfTest) -> Self {
        let stuck = answer.kvm == KvmKind::Software && !answer.ring3_kernel;
        let trouble = match (stuck, answer.reason.trim()) {
            (false, _) => String::new(),
            (true, "") => "the self-test does not say why".to_owned(),
            (true, why) => shorten(why),
        };
        Self {
            kind: Some(answer.kvm),
            trouble,
        }
    }
}

/// Tests KVM again from time to time, and when a VM did not start: it may be taken away, or come back, at any time. What has
/// changed is told to the scheduler.
pub(crate) async fn keep_testing(node: Arc<Node>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = node.kvm_doubted.notified() => {}
        }
        let mut found = HostKvm::test(node.vmm_binary()).await;
        let known = node.kvm.borrow().clone();
        if found.kind.is_none() && known.kind.is_some() {
            // A host that is very busy may fail one test.
            tokio::time::sleep(ONCE_MORE).await;
            found = HostKvm::test(node.vmm_binary()).await;
        }
        if found != known {
            tracing::info!(kind = ?found.kind, "KVM of this node is not as it was");
            found.warn();
            node.kvm.send_replace(found);
        }
    }
}

fn shorten(words: &str) -> String {
    let words: String = words.trim().chars().take(MAX_WORDS).collect();
    words.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// What the agent knows of a host where the self-test runs this.
    async fn tested(script: &str) -> HostKvm {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("shoal-vmm");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
        HostKvm::test(&path).await
    }

    #[tokio::test]
    async fn the_self_test_tells_the_kind_and_what_is_wrong() {
        let known = |kind, trouble: &str| HostKvm {
            kind,
            trouble: trouble.to_owned(),
        };
        let hardware = r#"echo '{"kvm":"hardware","ring3_kernel":false,"reason":"not needed"}'"#;
        assert_eq!(tested(hardware).await, known(Some(KvmKind::Hardware), ""));
        let software = r#"echo '{"kvm":"software","ring3_kernel":true,"reason":"","more":1}'"#;
        assert_eq!(tested(software).await, known(Some(KvmKind::Software), ""));
        let stuck = r#"echo '{"kvm":"software","ring3_kernel":false,"reason":"interrupts do not arrive"}'"#;
        let trouble = "interrupts do not arrive";
        assert_eq!(tested(stuck).await, known(Some(KvmKind::Software), trouble));
        let failed = "echo 'shoal-vmm: /dev/kvm: no such file' >&2; exit 1";
        assert_eq!(tested(failed).await, known(None, "/dev/kvm: no such file"));
    }

    #[tokio::test]
    async fn a_self_test_that_does_not_tell_is_said_to_be_so() {
        for (script, words) in [
            ("exit 1", "exit status: 1"),
            ("exit 0", "printed something else"),
            (
                r#"echo '{"kvm":"other","ring3_kernel":true}'"#,
                "printed something else",
            ),
            ("echo software", "printed something else"),
        ] {
            let known = tested(script).await;
            assert_eq!(known.kind, None);
            assert!(known.trouble.contains(words), "{script}: {}", known.trouble);
        }
        let absent = HostKvm::test(Path::new("no/such/program")).await;
        assert!(
            absent.kind.is_none() && absent.trouble.contains("no/such/program"),
            "{absent:?}"
        );
    }
}
