//! A scheduler that does not lead: answers what is stored, at most a second old, and says who leads.
//!
//! What only the leader knows, as it comes from the agents' reports, is not there: load, free memory, progress.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::LEADER_HEADER;
use tokio::sync::Mutex;
use tonic::Status;

use crate::images::ImageStore;
use crate::scheduler::Shared;
use crate::schedulers::Schedulers;
use crate::server::{self, Base, ServerError};
use crate::store::etcd::Etcd;
use crate::store::{Contents, Store};

/// What was read is looked at again after this.
const FRESH: Duration = Duration::from_secs(1);

/// One that follows.
#[derive(Debug)]
pub struct Follower {
    base: Arc<Base>,
    etcd: Etcd,
    schedulers: Schedulers,
    view: Mutex<Option<View>>,
}

#[derive(Debug)]
struct View {
    /// Of etcd, when it was read.
    revision: i64,
    looked: Instant,
    scheduler: Shared,
    blobs: Vec<String>,
}

impl Follower {
    /// Nothing is read yet.
    pub fn new(base: Arc<Base>, etcd: Etcd, schedulers: Schedulers) -> Self {
        Self {
            base,
            etcd,
            schedulers,
            view: Mutex::default(),
        }
    }

    /// What holds whether it leads or not.
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// Who there is.
    pub fn schedulers(&self) -> &Schedulers {
        &self.schedulers
    }

    /// Where blobs are.
    pub fn blob_directory(&self) -> PathBuf {
        self.base.config.state_dir.join("blobs")
    }

    /// What is stored. Nothing acts on it.
    pub async fn read(&self) -> Result<Shared, ServerError> {
        Ok(self.fresh().await?.0)
    }

    /// Every blob that images and VMs need.
    pub async fn blobs(&self) -> Result<Vec<String>, ServerError> {
        Ok(self.fresh().await?.1)
    }

    /// Read again only if something was written since.
    async fn fresh(&self) -> Result<(Shared, Vec<String>), ServerError> {
        let mut view = self.view.lock().await;
        if let Some(known) = view.as_mut() {
            let is_fresh = known.looked.elapsed() < FRESH || self.etcd.revision().await? == known.revision;
            if is_fresh {
                if known.looked.elapsed() >= FRESH {
                    known.looked = Instant::now();
                }
                return Ok((Arc::clone(&known.scheduler), known.blobs.clone()));
            }
        }
        let (looked, revision) = (Instant::now(), self.etcd.revision().await?);
        let store = Store::new(Arc::new(self.etcd.clone()), self.etcd.term().await?);
        let contents = store.load().await?;
        let blobs = needed(&contents);
        let images = ImageStore::view(self.blob_directory(), contents.images.clone());
        let (scheduler, _, intents) = server::build(
            &self.base.config,
            store,
            contents,
            images,
            self.schedulers.clone(),
        )?;
        for intent in intents {
            scheduler.migrations.open(Arc::new(intent));
        }
        *view = Some(View {
            revision,
            looked,
            scheduler: Arc::clone(&scheduler),
            blobs: blobs.clone(),
        });
        Ok((scheduler, blobs))
    }

    /// Why something is refused, and whom to ask.
    pub async fn refusal(&self) -> Status {
        let leader = match self.etcd.leader().await {
            Ok(leader) => leader,
            Err(error) => return Status::unavailable(crate::api::chain(&error)),
        };
        let Some(leader) = leader else {
            return Status::unavailable("no scheduler leads at the moment; try again in some seconds");
        };
        let address = leader.member.address;
        let mut status = Status::failed_precondition(format!(
            "this scheduler does not lead: ask the one at {address}, or name all of them with --scheduler"
        ));
        if let Ok(address) = address.parse() {
            status.metadata_mut().insert(LEADER_HEADER, address);
        }
        status
    }
}

/// Kernels and initrds of images, and of VMs whatever became of their images.
fn needed(contents: &Contents) -> Vec<String> {
    let mut blobs = contents.blobs();
    for image in &contents.images {
        blobs.push(image.kernel.sha256.clone());
        blobs.extend(image.initrd.as_ref().map(|initrd| initrd.sha256.clone()));
    }
    blobs.sort();
    blobs.dedup();
    blobs
}
