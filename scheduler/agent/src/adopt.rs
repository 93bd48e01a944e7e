//! What an agent does first: finds the VMMs of the agent before it. They have not noticed that it was gone.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::vm::vmm_client::VmmClient;
use shoal_proto::vm::{GetStatusRequest, VmState};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::Endpoint;

use crate::epochs::EpochError;
use crate::key::VmKey;
use crate::node::Node;
use crate::process::{ProcessIdentity, WatchedProcess};
use crate::retire::{Console, retire};
use crate::runtime_dir::{RuntimeDir, VmRecord};
use crate::vm::{ANSWER_LIMIT, Vm};

/// Why one directory could not be taken over. The agent must not start then: it would not report a VM that may run.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The directory of all VMMs.
    #[error("the VMMs of an earlier agent cannot be listed in {path}: {source}")]
    List {
        /// Where they are.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// One VMM's directory.
    #[error(
        "the VMM of an earlier agent in {path} cannot be adopted: {reason}; repair or remove that directory"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What was wrong.
        reason: String,
    },
}

/// Adopts every VMM that lives, keeps the last facts of those that ran and died, and clears away the rest.
pub(crate) async fn adopt_all(node: &Arc<Node>) -> Result<(), AdoptError> {
    let list_error = |source| AdoptError::List {
        path: node.vms_dir().to_owned(),
        source,
    };
    let mut adoptions = JoinSet::new();
    for entry in std::fs::read_dir(node.vms_dir()).map_err(list_error)? {
        let path = entry.map_err(list_error)?.path();
        let Some(key) = path
            .file_name()
            .and_then(|name| name.to_str()?.parse::<VmKey>().ok())
        else {
            tracing::warn!(?path, "not the directory of a VMM; ignored");
            continue;
        };
        let node = Arc::clone(node);
        adoptions.spawn(async move {
            let adopted = adopt(&node, key, path.clone()).await;
            adopted.map_err(|reason| AdoptError::Directory {
                path,
                reason: reason.to_string(),
            })
        });
    }
    while let Some(adoption) = adoptions.join_next().await {
        adoption.unwrap_or_else(|error| Err(list_error(io::Error::other(error))))?;
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error(transparent)]
    Epoch(#[from] EpochError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{}", .0.message())]
    Retire(Box<tonic::Status>),
}

async fn adopt(node: &Arc<Node>, key: VmKey, path: PathBuf) -> Result<(), Reason> {
    node.epochs.fence(key).await?;
    let dir = RuntimeDir::open(path)?;
    let process = find_process(&dir).await?;
    let record = dir.read_record().unwrap_or_else(|error| {
        tracing::warn!(vm = %key.id, epoch = %key.epoch, %error, "no record of this VM");
        VmRecord::unknown()
    });
    let gone = process.is_gone();
    if gone && !dir.has_run() {
        tracing::info!(vm = %key.id, epoch = %key.epoch, "cleared away a VMM that died before it ran");
        return Ok(dir.remove()?);
    }
    let vm = Arc::new(Vm::new(key, dir, process, &record)?);
    if !gone {
        match vm.refresh_status().await {
            Ok(status) if status.state() == VmState::Empty => {
                tracing::info!(vm = %key.id, epoch = %key.epoch, "ending a VMM that was started and never given its VM");
                return retire(node, &vm, Console::Drop)
                    .await
                    .map_err(|status| Reason::Retire(Box::new(status)));
            }
            Ok(status) => {
                tracing::info!(vm = %key.id, epoch = %key.epoch, state = status.state().as_str_name(), "adopted");
            }
            Err(status) => {
                tracing::warn!(vm = %key.id, epoch = %key.epoch, %status, "adopted, but it does not answer");
            }
        }
    }
    node.keep(vm);
    Ok(())
}

/// The VMM's process by its pid file, or by asking it: the agent may have died before it wrote the file.
async fn find_process(dir: &RuntimeDir) -> io::Result<WatchedProcess> {
    if let Some(identity) = dir.read_identity()? {
        return WatchedProcess::adopt(identity);
    }
    match ask_for_pid(dir).await {
        Some(pid) => {
            let identity = ProcessIdentity::of(pid)?;
            dir.write_identity(identity)?;
            WatchedProcess::adopt(identity)
        }
        None => Ok(WatchedProcess::gone(ProcessIdentity {
            pid: 0,
            start_ticks: 0,
        })),
    }
}

async fn ask_for_pid(dir: &RuntimeDir) -> Option<u32> {
    // Longer than any answer takes: a VMM that exists and is slow must not be taken for none.
    const LIMIT: Duration = ANSWER_LIMIT.saturating_mul(2);
    let endpoint = Endpoint::from_shared(format!("unix://{}", dir.socket_address())).ok()?;
    let answer = async {
        let mut client = VmmClient::new(endpoint.connect().await.ok()?);
        Some(
            client
                .get_status(GetStatusRequest {})
                .await
                .ok()?
                .into_inner()
                .pid,
        )
    };
    timeout(LIMIT, answer).await.ok().flatten()
}
