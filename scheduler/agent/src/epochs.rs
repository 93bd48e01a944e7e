//! The newest epoch that this node has seen for each VM, kept on disk, also when the VM has gone, for [`KEPT`] at least.
//!
//! This is the node's half of "never two running": whatever asks to start a VM at an epoch that is not newer than the
//! one stored is refused, and the new epoch is on disk before anything starts. One small file per VM, holding a number.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shoal_proto::{Epoch, VmId};

use crate::key::VmKey;

/// How long the epoch of a VM that is not here is kept. It guards against messages that are late, which wait for minutes at most:
/// whoever sends them gives up then.
pub(crate) const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Why a VM may not start at an epoch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EpochError {
    /// The scheduler's knowledge, or the message, is old.
    #[error(
        "epoch: {asked} is stale, this node has seen epoch {newest} of this VM; ask again with a newer one"
    )]
    Stale { asked: Epoch, newest: Epoch },
    /// Without knowing the newest epoch nothing may start.
    #[error(
        "the epoch file {path} cannot be used ({source}); nothing starts for this VM until it can be read and written"
    )]
    File { path: PathBuf, source: io::Error },
}

/// All epoch files of a node.
#[derive(Debug, Clone)]
pub(crate) struct EpochStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    newest: Mutex<HashMap<VmId, Epoch>>,
}

impl EpochStore {
    /// Opens, or creates, the directory of epoch files.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self {
            inner: Arc::new(Inner {
                dir,
                newest: Mutex::new(HashMap::new()),
            }),
        })
    }

    /// Stores the epoch as seen, if it is newer than every one before; then, and only then, the VM may start at it.
    pub(crate) async fn claim(&self, key: VmKey) -> Result<(), EpochError> {
        self.blocking(move |store| {
            let mut newest = store.lock();
            match store.newest(&mut newest, key.id)? {
                Some(seen) if seen >= key.epoch => Err(EpochError::Stale {
                    asked: key.epoch,
                    newest: seen,
                }),
                _ => store.store(&mut newest, key),
            }
        })
        .await
    }

    /// Stores the epoch as seen, so that nothing can start at it, or below it, any more.
    pub(crate) async fn fence(&self, key: VmKey) -> Result<(), EpochError> {
        self.blocking(move |store| {
            let mut newest = store.lock();
            match store.newest(&mut newest, key.id)? {
                Some(seen) if seen >= key.epoch => Ok(()),
                _ => store.store(&mut newest, key),
            }
        })
        .await
    }

    /// As [`Self::claim`], for a VMM that is to take the VM over from the one at `from` on this node. Until it runs, that
    /// one goes on; whether it ran is the caller's to know, who says so by [`Self::end_handover`].
    pub(crate) async fn claim_handover(&self, from: Epoch, key: VmKey) -> Result<(), EpochError> {
        self.blocking(move |store| {
            let mut newest = store.lock();
            match store.newest(&mut newest, key.id)? {
                Some(seen) if seen >= key.epoch => Err(EpochError::Stale {
                    asked: key.epoch,
                    newest: seen,
                }),
                _ => {
                    store.write_handover(key.id, (from, key.epoch))?;
                    store.store(&mut newest, key)
                }
            }
        })
        .await
    }

    /// The VM has run, or may have, at the epoch that took over.
    pub(crate) async fn end_handover(&self, key: VmKey) -> Result<(), EpochError> {
        self.blocking(move |store| {
            let _newest = store.lock();
            match store.handover(key.id)? {
                Some((_, to)) if to == key.epoch => store.remove_handover(key.id),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Refuses an epoch below the newest one: for what goes on at an epoch already claimed. `Ok(Some)`: there is a newer
    /// one, which was only to take over on this node; it may go on if that one has not run.
    pub(crate) async fn check_current(&self, key: VmKey) -> Result<Option<Epoch>, EpochError> {
        self.blocking(move |store| {
            let mut newest = store.lock();
            match store.newest(&mut newest, key.id)? {
                Some(seen) if seen > key.epoch => match store.handover(key.id)? {
                    Some((from, to)) if from == key.epoch && to == seen => Ok(Some(seen)),
                    _ => Err(EpochError::Stale {
                        asked: key.epoch,
                        newest: seen,
                    }),
                },
                _ => Ok(None),
            }
        })
        .await
    }

    /// Forgets VMs that are not here and whose epoch was stored so long ago that no message of that time can come any more.
    pub(crate) fn forget_old(&self, here: &HashSet<VmId>, age: Duration) -> io::Result<usize> {
        let mut newest = self.inner.lock();
        let mut forgotten = 0;
        for entry in fs::read_dir(&self.inner.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<VmId>().ok()) else {
                continue;
            };
            let stored = entry.metadata()?.modified()?;
            let is_old = stored.elapsed().is_ok_and(|since| since > age);
            if is_old && !here.contains(&id) && !self.inner.handover_path(id).exists() {
                fs::remove_file(entry.path())?;
                newest.remove(&id);
                forgotten += 1;
            }
        }
        Ok(forgotten)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, EpochError> + Send + 'static,
    ) -> Result<T, EpochError> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => Err(EpochError::File {
                path: self.inner.dir.clone(),
                source: io::Error::other(error),
            }),
        }
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VmId, Epoch>> {
        // The map only caches files; a panic elsewhere cannot leave it wrong.
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn newest(&self, cache: &mut HashMap<VmId, Epoch>, id: VmId) -> Result<Option<Epoch>, EpochError> {
        if let Some(&epoch) = cache.get(&id) {
            return Ok(Some(epoch));
        }
        let path = self.path(id);
        match read_epoch(&path) {
            Ok(Some(epoch)) => {
                cache.insert(id, epoch);
                Ok(Some(epoch))
            }
            Ok(None) => Ok(None),
            Err(source) => Err(EpochError::File { path, source }),
        }
    }

    fn store(&self, cache: &mut HashMap<VmId, Epoch>, key: VmKey) -> Result<(), EpochError> {
        let path = self.path(key.id);
        write_durably(&self.dir, &path, format!("{}\n", key.epoch).as_bytes())
            .map_err(|source| EpochError::File { path, source })?;
        cache.insert(key.id, key.epoch);
        Ok(())
    }

    fn path(&self, id: VmId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    fn handover_path(&self, id: VmId) -> PathBuf {
        self.dir.join(format!("{id}.handover"))
    }

    fn write_handover(&self, id: VmId, (from, to): (Epoch, Epoch)) -> Result<(), EpochError> {
        let path = self.handover_path(id);
        write_durably(&self.dir, &path, format!("{from} {to}\n").as_bytes())
            .map_err(|source| EpochError::File { path, source })
    }

    fn handover(&self, id: VmId) -> Result<Option<(Epoch, Epoch)>, EpochError> {
        let path = self.handover_path(id);
        let read = read_if_there(&path).and_then(|text| {
            let Some(text) = text else { return Ok(None) };
            let (from, to) = text.split_once(' ').ok_or_else(not_a_number)?;
            Ok(Some((parse_epoch(from)?, parse_epoch(to)?)))
        });
        read.map_err(|source| EpochError::File { path, source })
    }

    fn remove_handover(&self, id: VmId) -> Result<(), EpochError> {
        let path = self.handover_path(id);
        let removed = fs::remove_file(&path).and_then(|()| File::open(&self.dir)?.sync_all());
        removed.map_err(|source| EpochError::File { path, source })
    }
}

fn read_epoch(path: &Path) -> io::Result<Option<Epoch>> {
    read_if_there(path)?.map(|text| parse_epoch(&text)).transpose()
}

/// A file as text; none if there is no such file.
pub(crate) fn read_if_there(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse_epoch(text: &str) -> io::Result<Epoch> {
    text.trim_end().parse().map(Epoch).map_err(|_| not_a_number())
}

fn not_a_number() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a number")
}

/// After this returns the file has the new content, whatever happens to the host; before, the old one.
pub(crate) fn write_durably(dir: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: VmId, epoch: u64) -> VmKey {
        VmKey {
            id,
            epoch: Epoch(epoch),
        }
    }

    #[tokio::test]
    async fn only_newer_epochs_may_start_and_restarts_do_not_forget() {
        let dir = tempfile::tempdir().expect("a directory");
        let id = VmId::new();
        let store = EpochStore::open(dir.path().join("epochs")).expect("opened");
        store.claim(key(id, 3)).await.expect("the first");
        for stale in [0, 2, 3] {
            assert!(matches!(
                store.claim(key(id, stale)).await,
                Err(EpochError::Stale { newest: Epoch(3), .. })
            ));
        }
        let store = EpochStore::open(dir.path().join("epochs")).expect("opened again");
        assert!(matches!(
            store.claim(key(id, 3)).await,
            Err(EpochError::Stale { .. })
        ));
        store.claim(key(id, 4)).await.expect("newer");
        store.claim(key(VmId::new(), 1)).await.expect("another VM");
    }

    #[tokio::test]
    async fn a_fence_raises_and_never_lowers() {
        let dir = tempfile::tempdir().expect("a directory");
        let id = VmId::new();
        let store = EpochStore::open(dir.path().to_owned()).expect("opened");
        store.fence(key(id, 5)).await.expect("raised");
        store.fence(key(id, 2)).await.expect("nothing to do");
        assert!(matches!(
            store.claim(key(id, 5)).await,
            Err(EpochError::Stale { newest: Epoch(5), .. })
        ));
        store.check_current(key(id, 5)).await.expect("current");
        assert!(matches!(
            store.check_current(key(id, 4)).await,
            Err(EpochError::Stale { .. })
        ));
    }

    #[tokio::test]
    async fn an_epoch_that_was_only_to_take_over_lets_the_one_before_go_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let id = VmId::new();
        let store = EpochStore::open(dir.path().to_owned()).expect("opened");
        store.claim(key(id, 3)).await.expect("the first");
        store.claim_handover(Epoch(3), key(id, 4)).await.expect("newer");
        let store = EpochStore::open(dir.path().to_owned()).expect("opened again");
        let current = store.check_current(key(id, 3)).await.expect("may go on");
        assert_eq!(current, Some(Epoch(4)));
        assert!(
            store.check_current(key(id, 2)).await.is_err(),
            "not the one before that"
        );
        assert!(
            store.claim_handover(Epoch(3), key(id, 4)).await.is_err(),
            "used up"
        );
        store
            .claim_handover(Epoch(3), key(id, 5))
            .await
            .expect("a second attempt");
        assert_eq!(
            store.check_current(key(id, 3)).await.expect("may go on"),
            Some(Epoch(5))
        );
        store.end_handover(key(id, 4)).await.expect("not that one");
        assert!(store.check_current(key(id, 3)).await.is_ok());
        store.end_handover(key(id, 5)).await.expect("it ran");
        assert!(store.check_current(key(id, 3)).await.is_err());

        store.claim_handover(Epoch(5), key(id, 6)).await.expect("newer");
        store.fence(key(id, 7)).await.expect("raised from elsewhere");
        assert!(store.check_current(key(id, 5)).await.is_err());
    }

    #[tokio::test]
    async fn what_was_stored_long_ago_is_forgotten_unless_it_is_here() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = EpochStore::open(dir.path().to_owned()).expect("opened");
        let [old, here, takes_over, new] = [1, 2, 3, 4].map(|epoch| key(VmId::new(), epoch));
        for key in [old, here, new] {
            store.claim(key).await.expect("the first");
        }
        store
            .claim_handover(Epoch(2), takes_over)
            .await
            .expect("the first");
        for key in [old, here, takes_over] {
            let file = File::options().write(true).open(store.inner.path(key.id));
            let long_ago = std::time::SystemTime::now() - 2 * KEPT;
            file.expect("there").set_modified(long_ago).expect("set");
        }
        let forgotten = store.forget_old(&[here.id].into(), KEPT).expect("looked at");
        assert_eq!(forgotten, 1);
        store.claim(old).await.expect("nothing is known of it");
        for key in [here, takes_over, new] {
            assert!(matches!(store.claim(key).await, Err(EpochError::Stale { .. })));
        }
    }

    #[tokio::test]
    async fn a_damaged_file_stops_the_vm_from_starting() {
        let dir = tempfile::tempdir().expect("a directory");
        let id = VmId::new();
        fs::write(dir.path().join(id.to_string()), "12a").expect("written");
        let store = EpochStore::open(dir.path().to_owned()).expect("opened");
        let error = store.claim(key(id, 99)).await.expect_err("refused");
        assert!(matches!(&error, EpochError::File { .. }), "{error}");
    }
}
