//! TCP and UDP over loopback, every byte checked.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

use crate::check::{Check, Outcome, Stop, check};
use crate::sys::{Child, Random, check_stream, raw, send_stream};
use crate::{ensure, ensure_eq, skip, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("net.tcp-streams", tcp_streams),
    check("net.tcp-both-ways", tcp_both_ways),
    check("net.tcp-many-connections", tcp_many_connections),
    check("net.tcp-ends", tcp_ends),
    check("net.tcp-non-blocking", tcp_non_blocking),
    check("net.tcp-ipv6", tcp_ipv6),
    check("net.udp", udp),
    check("net.udp-refused", udp_refused),
];

const STREAM: usize = 4 << 20;
/// A port that is given to nobody who does not ask for it (discard).
const NOBODY: u16 = 9;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Brings the loopback interface up, as init leaves that to others.
///
/// # Errors
/// If it cannot be done, though there is one.
pub fn loopback_up() -> Outcome {
    const SIOCGIFFLAGS: i32 = 0x8913;
    const SIOCSIFFLAGS: i32 = 0x8914;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: all zeros is a request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    syscall!(SYS_ioctl, raw(&socket), SIOCGIFFLAGS, &raw mut request)?;
    // SAFETY: the kernel has just filled in this one.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = i16::try_from(libc::IFF_UP)?;
    if flags & up == 0 {
        request.ifr_ifru.ifru_flags = flags | up;
        syscall!(SYS_ioctl, raw(&socket), SIOCSIFFLAGS, &raw mut request)?;
    }
    Ok(())
}

fn listen(address: IpAddr) -> Outcome<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((address, 0))?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn one_stream(address: IpAddr, length: usize, seed: u64) -> Outcome {
    let (listener, address) = listen(address)?;
    let child = Child::start(|| {
        let stream = TcpStream::connect(address)?;
        send_stream(&stream, length, seed)
    })?;
    let (stream, _) = listener.accept()?;
    check_stream(stream, length, seed)?;
    child.join()
}

fn tcp_streams() -> Outcome {
    let threads: Vec<_> = (0..3)
        .map(|seed| std::thread::spawn(move || one_stream(LOOPBACK, STREAM, seed)))
        .collect();
    threads.into_iter().try_for_each(|thread| {
        thread
            .join()
            .map_err(|_| Stop::Fail("a thread panicked".into()))?
    })
}

fn tcp_both_ways() -> Outcome {
    let (listener, address) = listen(LOOPBACK)?;
    let both = |stream: &TcpStream, own: u64, other: u64| -> Outcome {
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                send_stream(stream, STREAM / 2, own)?;
                Ok(stream.shutdown(Shutdown::Write)?)
            });
            check_stream(stream, STREAM / 2, other)?;
            sender
                .join()
                .map_err(|_| Stop::Fail("a thread panicked".into()))?
        })
    };
    let child = Child::start(|| both(&TcpStream::connect(address)?, 1, 2))?;
    both(&listener.accept()?.0, 2, 1)?;
    child.join()
}

fn tcp_many_connections() -> Outcome {
    let (listener, address) = listen(LOOPBACK)?;
    let child = Child::start(move || {
        for round in 0..100u32 {
            let mut stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            for word in 0..5 {
                stream.write_all(&(round + word).to_le_bytes())?;
                let mut back = [0; 4];
                stream.read_exact(&mut back)?;
                ensure_eq!(u32::from_le_bytes(back), !(round + word), "the answer");
            }
        }
        Ok(())
    })?;
    for _ in 0..100 {
        let (mut stream, _) = listener.accept()?;
        let mut word = [0; 4];
        while stream.read_exact(&mut word).is_ok() {
            stream.write_all(&word.map(|byte| !byte))?;
        }
    }
    child.join()
}

fn tcp_ends() -> Outcome {
    let (listener, address) = listen(LOOPBACK)?;
    // Half closed, the other half goes on.
    let near = TcpStream::connect(address)?;
    let (far, _) = listener.accept()?;
    near.shutdown(Shutdown::Write)?;
    ensure_eq!((&far).read(&mut [0; 8])?, 0, "the end");
    (&far).write_all(b"later")?;
    let mut bytes = [0; 5];
    (&near).read_exact(&mut bytes)?;
    ensure_eq!(&bytes, b"later", "the other way");
    // Reset, as what came was not read.
    let near = TcpStream::connect(address)?;
    let (far, _) = listener.accept()?;
    (&near).write_all(b"not read")?;
    far.peek(&mut [0; 8])?;
    drop(far);
    let reset = (&near).read(&mut [0; 8]);
    ensure_eq!(
        reset.err().and_then(|error| error.raw_os_error()),
        Some(libc::ECONNRESET),
        "a reset"
    );
    let refused = TcpStream::connect((LOOPBACK, NOBODY))
        .err()
        .and_then(|error| error.raw_os_error());
    ensure_eq!(refused, Some(libc::ECONNREFUSED), "nobody listens");
    Ok(())
}

fn tcp_non_blocking() -> Outcome {
    let (listener, address) = listen(LOOPBACK)?;
    let near = TcpStream::connect(address)?;
    let (far, _) = listener.accept()?;
    near.set_nonblocking(true)?;
    let mut random = Random::new(6);
    let mut block = vec![0; 1 << 16];
    random.fill(&mut block);
    let mut sent = 0;
    loop {
        match (&near).write(&block) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
        ensure!(sent < 256 << 20, "it takes bytes without end");
    }
    far.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut came = 0;
    let mut bytes = vec![0; 1 << 16];
    while came < sent {
        let count = (&far).read(&mut bytes)?;
        ensure!(count > 0, "the end after {came} bytes of {sent}");
        came += count;
    }
    ensure_eq!(
        (&near).read(&mut [0]).err().map(|error| error.kind()),
        Some(std::io::ErrorKind::WouldBlock),
        "nothing"
    );
    (&near).write_all(b"x")?;
    Ok(())
}

fn tcp_ipv6() -> Outcome {
    let loopback = IpAddr::V6(Ipv6Addr::LOCALHOST);
    match TcpListener::bind((loopback, 0)) {
        Err(error)
            if [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL].contains(&error.raw_os_error().unwrap_or(0)) =>
        {
            skip!("no IPv6: {error}")
        }
        _ => one_stream(loopback, STREAM / 4, 9),
    }
}

fn udp() -> Outcome {
    let server = UdpSocket::bind((LOOPBACK, 0))?;
    let client = UdpSocket::bind((LOOPBACK, 0))?;
    client.connect(server.local_addr()?)?;
    client.set_read_timeout(Some(Duration::from_secs(30)))?;
    server.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut random = Random::new(8);
    let mut received = vec![0; 65_536];
    for size in [0, 1, 8, 1472, 1473, 9000, 65_507].into_iter().cycle().take(70) {
        let mut sent = vec![0; size];
        random.fill(&mut sent);
        client.send(&sent)?;
        let (count, from) = server.recv_from(&mut received)?;
        ensure!(
            received[..count] == sent && from == client.local_addr()?,
            "{count} bytes of {size}"
        );
        server.send_to(&sent[..size.min(100)], from)?;
        ensure_eq!(client.recv(&mut received)?, size.min(100), "the answer");
    }
    let too_long = client.send(&vec![0; 65_508]);
    ensure_eq!(
        too_long.err().and_then(|error| error.raw_os_error()),
        Some(libc::EMSGSIZE),
        "one byte too many"
    );
    Ok(())
}

fn udp_refused() -> Outcome {
    let client = UdpSocket::bind((LOOPBACK, 0))?;
    client.connect((LOOPBACK, NOBODY))?;
    client.send(b"anybody")?;
    client.set_read_timeout(Some(Duration::from_secs(30)))?;
    let refused = client
        .recv(&mut [0; 8])
        .err()
        .and_then(|error| error.raw_os_error());
    ensure_eq!(refused, Some(Errno::ECONNREFUSED as i32), "nobody listens");
    Ok(())
}
