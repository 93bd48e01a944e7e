//! A scheduler that does not lead: answers what is stored, at most a second old, and says who leads.
//!
//! What only the leader knows, as it comes from the agents' reports, is not there: load, free memory, progress.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::LEADER_HEADER;
use tokio::sync::{Mutex, OnceCell};
use tonic::Status;

use crate::images::ImageStore;
use crate::scheduler::Shared;
use crate::schedulers::Schedulers;
use crate::server::{self, Base, ServerError};
use crate::store::Store;
use crate::store::etcd::Etcd;

/// What was read is looked at again after this.
const FRESH: Duration = Duration::from_secs(1);

/// One that follows.
#[derive(Debug)]
pub struct Follower {
    base: Arc<Base>,
    etcd: Etcd,
    schedulers: Schedulers,
    view: Mutex<Option<View>>,
    /// Blobs that VMs needed when this scheduler began to follow. Those of later VMs are of images that it has seen.
    of_vms: OnceCell<Vec<String>>,
}

#[derive(Debug)]
struct View {
    /// Of etcd, when it was read.
    revision: i64,
    looked: Instant,
    scheduler: Shared,
}

impl Follower {
    /// Nothing is read yet.
    pub fn new(base: Arc<Base>, etcd: Etcd, schedulers: Schedulers) -> Self {
        Self {
            base,
            etcd,
            schedulers,
            view: Mutex::default(),
            of_vms: OnceCell::new(),
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

    /// Every blob that images and VMs need. Cheap enough to be asked each second.
    pub async fn blobs(&self) -> Result<Vec<String>, ServerError> {
        let store = self.store().await?;
        let of_vms = async || Ok::<_, ServerError>(store.load().await?.blobs());
        let mut blobs = self.of_vms.get_or_try_init(of_vms).await?.clone();
        for image in store.images().await? {
            blobs.extend(image.blobs().map(|blob| blob.sha256.clone()));
        }
        blobs.sort();
        blobs.dedup();
        Ok(blobs)
    }

    async fn store(&self) -> Result<Store, ServerError> {
        Ok(Store::new(Arc::new(self.etcd.clone()), self.etcd.term().await?))
    }

    /// What is stored, read again only if something was written since. Nothing acts on it.
    pub async fn read(&self) -> Result<Shared, ServerError> {
        let mut view = self.view.lock().await;
        if let Some(known) = view.as_mut() {
            if known.looked.elapsed() < FRESH {
                return Ok(Arc::clone(&known.scheduler));
            }
            let looked = Instant::now();
            if self.etcd.revision().await? == known.revision {
                known.looked = looked;
                return Ok(Arc::clone(&known.scheduler));
            }
        }
        let (looked, revision) = (Instant::now(), self.etcd.revision().await?);
        let store = self.store().await?;
        let contents = store.load().await?;
        let images = ImageStore::view(self.blob_directory(), contents.images.clone());
        let (scheduler, _, unfinished) = server::build(
            &self.base.config,
            store,
            contents,
            images,
            self.schedulers.clone(),
        )?;
        for intent in unfinished.intents {
            scheduler.migrations.take_up(Arc::new(intent));
        }
        *view = Some(View {
            revision,
            looked,
            scheduler: Arc::clone(&scheduler),
        });
        Ok(scheduler)
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
