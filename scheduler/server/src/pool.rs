//! Threads of their own, for work that has to go on however busy tokio's shared blocking threads are.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// A few threads that take work in the order in which it comes. They end with the last handle.
#[derive(Debug, Clone)]
pub struct Pool {
    jobs: mpsc::Sender<Job>,
}

/// The work panicked, or its threads have ended.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the work did not come to its end")]
pub struct Broken;

impl Pool {
    /// So many threads of this name.
    pub fn new(name: &str, threads: usize) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let queue = Arc::clone(&queue);
            let work = move || {
                loop {
                    // The lock is let go before the work begins.
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    // Whoever waits is told by the end of its channel; the thread goes on.
                    let _ = catch_unwind(AssertUnwindSafe(job));
                }
            };
            std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
        }
        Ok(Self { jobs })
    }

    /// Runs work there. It is done also if nobody waits for it any more.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Broken> {
        let (done, result) = oneshot::channel();
        let job = move || {
            let _ = done.send(work());
        };
        self.jobs.send(Box::new(job)).map_err(|_| Broken)?;
        result.await.map_err(|_| Broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_done_and_a_panic_ends_no_thread() {
        let pool = Pool::new("test", 1).expect("a thread");
        assert_eq!(pool.run(|| 6 * 7).await.expect("done"), 42);
        assert!(pool.run(|| panic!("on purpose")).await.is_err());
        assert_eq!(pool.run(|| 1).await.expect("the thread goes on"), 1);
    }
}
