//! What the machine can do at best, measured in the same run.

use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use crate::figures::{References, median};
use crate::memory;

const BUFFER: usize = 512 << 20;
const CHUNK: usize = 1 << 20;
const REPEATS: usize = 5;

/// Measures them all; each is the median of five.
///
/// # Errors
/// If there is no loopback network.
pub fn measure() -> Result<References> {
    let source: Vec<u8> = (0..BUFFER).map(|index| index.to_le_bytes()[0] | 1).collect();
    let mut target = vec![1u8; BUFFER];
    let memcpy_touched = repeat(|| {
        target.copy_from_slice(black_box(&source));
        black_box(&mut target);
        Ok(())
    })?;
    drop(target);
    let memcpy_fresh = repeat(|| {
        // From the kernel, as every allocation of this size: zero and not yet there.
        let mut target = vec![0u8; BUFFER];
        target.copy_from_slice(black_box(&source));
        black_box(&mut target);
        Ok(())
    })?;
    let memcpy_fresh_huge = repeat(|| {
        let mut target = memory::fresh(BUFFER)?;
        target[..BUFFER].copy_from_slice(black_box(&source));
        black_box(&mut target);
        Ok(())
    })?;
    let tcp = repeat(|| send(&source, CHUNK))?;
    let tcp_fresh = repeat(|| send(&source, BUFFER))?;
    let busy = BusyCpu::start();
    let tcp_fresh_beside_busy_cpu = repeat(|| send(&source, BUFFER))?;
    drop(busy);
    let tls = repeat(|| send_tls(&source))?;
    Ok(References {
        memcpy_touched,
        memcpy_fresh,
        memcpy_fresh_huge,
        tcp,
        tcp_fresh,
        tcp_fresh_beside_busy_cpu,
        tls,
    })
}

/// Bytes per second of something that handles [`BUFFER`] bytes.
fn repeat(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut rates = Vec::new();
    for _ in 0..REPEATS {
        let start = Instant::now();
        work()?;
        rates.push(BUFFER as f64 / start.elapsed().as_secs_f64());
    }
    Ok(median(&rates))
}

/// Sends `data` to a receiver with a buffer of `room` bytes that is fresh when it begins.
fn send(data: &[u8], room: usize) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no loopback network")?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    thread::scope(|scope| {
        let sending = scope.spawn(move || data.chunks(CHUNK).try_for_each(|chunk| sender.write_all(chunk)));
        let mut target = memory::fresh(room)?;
        for index in 0..data.len() / CHUNK {
            let start = index * CHUNK % room;
            receiver.read_exact(&mut target[start..start + CHUNK])?;
        }
        black_box(&mut target);
        sending.join().ok().context("the sender panicked")??;
        Ok(())
    })
}

/// The same over TLS 1.3, into one buffer.
fn send_tls(data: &[u8]) -> Result<()> {
    const NAME: &str = "reference";
    let own = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let mut roots = RootCertStore::empty();
    roots.add(own.cert.der().clone())?;
    let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der());
    let client = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key.into())?;
    let listener = TcpListener::bind("127.0.0.1:0").context("no loopback network")?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (receiver, _) = listener.accept()?;
    let session = ClientConnection::new(Arc::new(client), NAME.try_into()?)?;
    let mut sender = StreamOwned::new(session, sender);
    let mut receiver = StreamOwned::new(ServerConnection::new(Arc::new(server))?, receiver);
    thread::scope(|scope| {
        // The sender stays open until all has arrived: it never reads the session tickets, and closing would reset.
        let sender = &mut sender;
        let sending = scope.spawn(move || {
            data.chunks(CHUNK).try_for_each(|chunk| sender.write_all(chunk))?;
            sender.flush()
        });
        let mut target = memory::fresh(CHUNK)?;
        for _ in 0..data.len() / CHUNK {
            receiver.read_exact(&mut target[..CHUNK])?;
        }
        black_box(&mut target);
        sending.join().ok().context("the sender panicked")??;
        Ok(())
    })
}

/// A thread that never sleeps, as the probe.
struct BusyCpu {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl BusyCpu {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut work = 0u64;
            while !seen.load(Ordering::Relaxed) {
                work = black_box(work.wrapping_add(1));
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for BusyCpu {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join()); // it cannot panic
        }
    }
}
