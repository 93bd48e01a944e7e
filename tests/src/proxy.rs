//! A TCP connection through the harness that can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

const BUFFER: usize = 64 << 10;

/// Passes one connection on to `target` and cuts it, both ways, once so many bytes went there.
#[derive(Debug)]
pub struct CuttingProxy {
    address: SocketAddr,
    passed: Arc<AtomicU64>,
}

impl CuttingProxy {
    /// Listens on loopback.
    #[must_use]
    pub fn start(target: SocketAddr, cut_after: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let passed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&passed);
        thread::spawn(move || {
            for source in listener.incoming() {
                let (Ok(source), Ok(destination)) = (source, TcpStream::connect(target)) else {
                    return;
                };
                let (Ok(back_from), Ok(back_to)) = (destination.try_clone(), source.try_clone()) else {
                    return;
                };
                thread::spawn(move || pass(back_from, back_to, u64::MAX, &AtomicU64::new(0)));
                let counter = Arc::clone(&counter);
                thread::spawn(move || pass(source, destination, cut_after, &counter));
            }
        });
        Self { address, passed }
    }

    /// Where to connect instead of the target.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that went to the target so far.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::SeqCst)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, cut_after: u64, passed: &AtomicU64) {
    let mut buffer = vec![0; BUFFER];
    while passed.load(Ordering::SeqCst) < cut_after {
        match from.read(&mut buffer) {
            Ok(length) if length > 0 && to.write_all(&buffer[..length]).is_ok() => {
                passed.fetch_add(length as u64, Ordering::SeqCst);
            }
            _ => break,
        }
    }
    for stream in [from, to] {
        drop(stream.shutdown(Shutdown::Both)); // it may be closed already
    }
}
