//! What the tests share: an agent in this process, a scheduler's Registry in this process, and scripted VMMs in
//! processes of their own.

pub mod agent;
pub mod registry;
pub mod vmm;

use std::time::Duration;

/// How long anything may take that should happen.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Waits for the condition, which is looked at again and again.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let holds = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, holds)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}
