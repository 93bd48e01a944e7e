//! Over loopback, with certificates made for each test.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use shoal_proto::vm::MigrationTls;
use tempfile::TempDir;

use super::*;
use crate::migration::wire::{self, Connection, FrameKind, WireError};

/// Only what goes wrong waits for as long as this.
const PLENTY: Duration = Duration::from_secs(30);

struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate for a test may differ in.
#[derive(Default)]
struct Issue {
    expired: bool,
    future: bool,
}

impl Authority {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut params = CertificateParams::new(vec![]).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        std::fs::write(dir.path().join("ca.pem"), certificate.pem()).expect("written");
        Self {
            issuer: Issuer::new(params, key),
            dir,
        }
    }

    fn issue(&self, node: &str, how: &Issue) {
        let mut params = CertificateParams::new(vec![node.to_owned()]).expect("a name");
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        if how.expired {
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        }
        if how.future {
            params.not_before = rcgen::date_time_ymd(2100, 1, 1);
        }
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        self.write(node, "pem", &certificate.pem());
        self.write(node, "key", &key.serialize_pem());
    }

    fn write(&self, node: &str, suffix: &str, text: &str) {
        std::fs::write(self.dir.path().join(format!("{node}.{suffix}")), text).expect("written");
    }

    fn files(&self, node: &str, peer: &str) -> MigrationTls {
        let path = |file: String| self.dir.path().join(file).to_str().expect("UTF-8").to_owned();
        MigrationTls {
            ca_path: path("ca.pem".into()),
            certificate_path: path(format!("{node}.pem")),
            key_path: path(format!("{node}.key")),
            peer_name: peer.into(),
        }
    }

    fn identity(&self, node: &str, peer: &str) -> Identity {
        self.issue(node, &Issue::default());
        Identity::load(&self.files(node, peer)).expect("an identity")
    }
}

fn loopback() -> Listener {
    Listener::bind(&Address::Tcp((Ipv4Addr::LOCALHOST, 0).into())).expect("a port")
}

fn soon() -> Instant {
    Instant::now() + PLENTY
}

type Connected = (
    Result<Transport, TransportError>,
    Result<(Transport, String), AcceptError>,
);

/// Source and destination meet.
fn meet(source: Option<&Identity>, destination: Option<&Identity>) -> Connected {
    let listener = loopback();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(destination, soon()));
        let connected = Transport::connect(listener.local_address(), source, PLENTY);
        (connected, accepting.join().expect("no panic"))
    })
}

fn pair(tls: bool) -> (Transport, Transport) {
    let authority = Authority::new("test");
    let [a, b] = [("a", "b"), ("b", "a")].map(|(own, peer)| tls.then(|| authority.identity(own, peer)));
    let listener = loopback();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(b.as_ref(), soon()).expect("accepted").0);
        let mut source = Transport::connect(listener.local_address(), a.as_ref(), PLENTY).expect("connected");
        // A plain stream shows what it is with its first byte.
        source.write_all(&wire::MAGIC).expect("written");
        let mut destination = accepting.join().expect("no panic");
        let mut magic = [0; 8];
        destination.read_exact(&mut magic).expect("read");
        assert_eq!(magic, wire::MAGIC);
        // A test that fails ends.
        for side in [&source, &destination] {
            side.set_timeouts(Some(PLENTY)).expect("set");
        }
        (source, destination)
    })
}

/// What both sides say about certificates that do not fit.
fn refusals(source: &Identity, destination: &Identity) -> (String, String) {
    let (connected, accepted) = meet(Some(source), Some(destination));
    (
        connected
            .expect_err("the source is refused or refuses")
            .to_string(),
        accepted
            .expect_err("the destination refuses or is refused")
            .to_string(),
    )
}

#[test]
fn both_prove_who_they_are_and_bytes_go_both_ways() {
    let (mut source, mut destination) = pair(true);
    assert!(source.is_tls() && destination.is_tls());
    assert!(!source.local_host());
    destination.write_all(b"from b").expect("written");
    let mut buffer = [0; 6];
    source.read_exact(&mut buffer).expect("read");
    assert_eq!(&buffer, b"from b");
}

#[test]
fn another_authority_is_refused_by_both_sides() {
    // Of the same name, too: then it is the signature that does not fit.
    for other in ["other", "ours"] {
        let (ours, other) = (Authority::new("ours"), Authority::new(other));
        let (source, destination) = refusals(&other.identity("a", "b"), &ours.identity("b", "a"));
        assert!(source.contains("not signed by the authority in"), "{source}");
        assert!(
            destination.contains("refused this node's certificate"),
            "{destination}"
        );
    }
    // The source accepts the destination, but not the other way round.
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let mut files = other.files("a", "b");
    other.issue("a", &Issue::default());
    ours.identity("b", "a");
    files.ca_path = ours.files("b", "a").ca_path;
    let source = Identity::load(&files).expect("an identity");
    let (source, destination) = refusals(&source, &ours.identity("b", "a"));
    assert!(
        source.contains("not signed by the authority that the other side trusts"),
        "{source}"
    );
    assert!(
        destination.contains("not signed by the authority in"),
        "{destination}"
    );
}

#[test]
fn another_node_is_refused_by_name() {
    let authority = Authority::new("test");
    // The source came to the wrong destination.
    let (source, destination) = refusals(&authority.identity("a", "c"), &authority.identity("b", "a"));
    assert_eq!(source, "the other side is node 'b', expected 'c'");
    assert!(destination.contains("not one for a node"), "{destination}");
    // The wrong source came to the destination.
    let (source, destination) = refusals(&authority.identity("c", "b"), &authority.identity("b", "a"));
    assert!(
        source.contains("refused the connection: the other side is node 'c', expected 'a'"),
        "{source}"
    );
    assert!(
        destination.contains("the other side is node 'c', expected 'a'"),
        "{destination}"
    );
}

#[test]
fn certificates_out_of_date_are_refused() {
    let authority = Authority::new("test");
    let good = authority.identity("b", "a");
    for (how, says) in [
        (
            Issue {
                expired: true,
                ..Issue::default()
            },
            "has expired",
        ),
        (
            Issue {
                future: true,
                ..Issue::default()
            },
            "not valid yet",
        ),
    ] {
        authority.issue("a", &how);
        let source = Identity::load(&authority.files("a", "b")).expect("the VMM leaves dates to its peer");
        let (source, destination) = refusals(&source, &good);
        assert!(
            source.contains("refused this node's certificate: it has expired"),
            "{source}"
        );
        assert!(destination.contains(says), "{destination}");
    }
}

#[test]
fn a_source_without_a_certificate_is_refused() {
    let authority = Authority::new("test");
    let destination = authority.identity("b", "a");
    let listener = loopback();
    let roots = {
        use rustls::pki_types::{CertificateDer, pem::PemObject as _};
        let mut roots = rustls::RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(authority.files("b", "a").ca_path).expect("PEM");
        roots.add(ca).expect("an authority");
        roots
    };
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(&destination), soon()));
        let Address::Tcp(address) = *listener.local_address() else {
            unreachable!("bound to TCP");
        };
        let mut stream = TcpStream::connect(address).expect("connected");
        let name = "b".try_into().expect("a name");
        let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name).expect("a client");
        // The client may think that it is through, until it reads.
        let end = rustls::Stream::new(&mut client, &mut stream)
            .read(&mut [0])
            .expect_err("refused");
        assert!(end.to_string().contains("CertificateRequired"), "{end}");
        let error = accepting
            .join()
            .expect("no panic")
            .expect_err("refused")
            .to_string();
        assert!(error.contains("showed no certificate"), "{error}");
    });
}

#[test]
fn a_plaintext_source_is_told_that_tls_is_required() {
    let authority = Authority::new("test");
    let destination = authority.identity("b", "a");
    let listener = loopback();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(&destination), soon()));
        let source = Transport::connect(listener.local_address(), None, PLENTY).expect("connected");
        let connection = Connection::new(source);
        // Nobody reads it; the refusal must arrive all the same.
        let stream_of_a_source = [&wire::MAGIC[..], &[0; 5000]].concat();
        let mut stream = connection.map_stream(|mut stream| {
            stream.write_all(&stream_of_a_source).expect("written");
            stream
        });
        match stream.receive() {
            Ok((FrameKind::Abort, payload)) => {
                let WireError::Aborted(reason) = wire::aborted(&payload) else {
                    panic!("not a reason");
                };
                assert!(reason.contains("requires TLS"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        drop(stream);
        let error = accepting.join().expect("no panic").expect_err("refused");
        assert!(matches!(
            error,
            AcceptError::TurnedAway {
                reason: TransportError::PlaintextSource,
                ..
            }
        ));
    });
}

#[test]
fn tls_to_a_plaintext_destination_is_refused() {
    let authority = Authority::new("test");
    let (source, destination) = meet(Some(&authority.identity("a", "b")), None);
    let error = source.expect_err("refused").to_string();
    assert!(error.contains("takes plain connections only"), "{error}");
    assert!(matches!(
        destination,
        Err(AcceptError::TurnedAway {
            reason: TransportError::TlsSource,
            ..
        })
    ));
}

#[test]
fn tls_to_something_else_is_refused() {
    let authority = Authority::new("test");
    let identity = authority.identity("a", "b");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = Address::Tcp(listener.local_addr().expect("an address"));
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().expect("accepted");
            stream.write_all(b"220 mail.example ESMTP\r\n").expect("written");
            let mut all = vec![];
            let _ = stream.read_to_end(&mut all);
        });
        let error = Transport::connect(&address, Some(&identity), PLENTY).expect_err("not TLS");
        assert!(error.to_string().contains("does not speak TLS"), "{error}");
    });
}

/// A ClientHello of TLS 1.2: no supported_versions extension. Suites and curve as a client of that time offers them.
fn client_hello_of_tls_1_2() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0]); // no session
    body.extend([0, 2, 0xc0, 0x2b]); // ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
    body.extend([1, 0]); // no compression
    let extensions: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 23, // supported_groups: secp256r1
        0, 11, 0, 2, 1, 0, // ec_point_formats: uncompressed
        0, 13, 0, 4, 0, 2, 4, 3, // signature_algorithms: ecdsa_secp256r1_sha256
    ];
    body.extend(u16::try_from(extensions.len()).expect("few").to_be_bytes());
    body.extend(extensions);
    let length = u16::try_from(body.len()).expect("short");
    let mut record = vec![22, 3, 1];
    record.extend((length + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend(length.to_be_bytes());
    record.extend(body);
    record
}

#[test]
fn tls_1_2_is_refused() {
    let authority = Authority::new("test");
    let destination = authority.identity("b", "a");
    let listener = loopback();
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(Some(&destination), soon()));
        let Address::Tcp(address) = *listener.local_address() else {
            unreachable!("bound to TCP");
        };
        let mut stream = TcpStream::connect(address).expect("connected");
        stream.write_all(&client_hello_of_tls_1_2()).expect("written");
        let mut answer = vec![];
        stream.read_to_end(&mut answer).expect("read");
        // A fatal alert: protocol_version.
        assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70]);
        drop(stream);
        let error = accepting
            .join()
            .expect("no panic")
            .expect_err("refused")
            .to_string();
        assert!(error.contains("does not offer TLS 1.3"), "{error}");
    });
}

#[test]
fn a_stranger_is_turned_away() {
    for tls in [true, false] {
        let authority = Authority::new("test");
        let identity = tls.then(|| authority.identity("b", "a"));
        let listener = loopback();
        thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept(identity.as_ref(), soon()));
            let mut source = Transport::connect(listener.local_address(), None, PLENTY).expect("connected");
            source.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("written");
            assert!(matches!(
                accepting.join().expect("no panic"),
                Err(AcceptError::TurnedAway {
                    reason: TransportError::Stranger,
                    ..
                })
            ));
        });
    }
}

#[test]
fn a_silent_peer_holds_nobody_for_long() {
    let authority = Authority::new("test");
    let identity = authority.identity("b", "a");
    let listener = loopback();
    // Nothing at all, and the beginning of a ClientHello.
    for sent in [&[][..], &client_hello_of_tls_1_2()[..20]] {
        thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept(Some(&identity), soon()));
            let mut source = Transport::connect(listener.local_address(), None, PLENTY).expect("connected");
            source.write_all(sent).expect("written");
            assert!(matches!(
                accepting.join().expect("no panic"),
                Err(AcceptError::TurnedAway {
                    reason: TransportError::Silent,
                    ..
                })
            ));
        });
    }
}

fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

/// Bytes that do not repeat for a while.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1u64;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()[7]
    })
    .take(length)
    .collect()
}

/// Parts of many sizes, empty ones among them, more than one call takes.
fn split(mut bytes: &mut [u8], sizes: &[usize]) -> Vec<libc::iovec> {
    let mut parts = vec![];
    for size in sizes.iter().cycle() {
        let (part, rest) = bytes.split_at_mut((*size).min(bytes.len()));
        parts.push(iovec(part));
        bytes = rest;
        if bytes.is_empty() {
            return parts;
        }
    }
    parts
}

#[test]
fn a_large_vectored_transfer_arrives_whole() {
    for (mut source, mut destination) in [pair(false), pair(true), unix_pair()] {
        let mut sent = pattern(24 << 20);
        let mut received = vec![0u8; sent.len()];
        let expected = sent.clone();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut parts = split(&mut sent, &[16, 0, 4096, 12288, 1, 4096, 60_000]);
                assert!(parts.len() > 1024);
                // SAFETY: the parts are of `sent`, borrowed for the length of the scope.
                unsafe { source.write_guest(&mut parts) }.expect("sent");
                let end = [IoSlice::new(b"the "), IoSlice::new(b""), IoSlice::new(b"end")];
                assert_eq!(source.write_vectored(&end).expect("sent"), 7);
            });
            let mut parts = split(&mut received, &[4096, 8192, 3, 0, 300_000]);
            // SAFETY: the parts are of `received`, borrowed for the length of the scope.
            unsafe { destination.read_guest(&mut parts) }.expect("received");
            let mut end = [0; 7];
            destination.read_exact(&mut end).expect("received");
            assert_eq!(&end, b"the end");
        });
        assert!(received == expected);
    }
}

#[test]
fn what_is_read_in_part_is_not_lost_between_writes() {
    let (mut source, mut destination) = pair(true);
    source.write_all(&pattern(100_000)).expect("sent");
    let mut received = vec![0; 100_000];
    let (first, rest) = received.split_at_mut(10);
    destination.read_exact(first).expect("read");
    assert!(destination.readable_within(Duration::ZERO).expect("asked"));
    // Sending decrypts what has come.
    destination.write_all(b"answer").expect("sent");
    let (middle, rest) = rest.split_at_mut(50_000);
    let read = destination
        .read_vectored(&mut [IoSliceMut::new(middle)])
        .expect("read");
    destination.read_exact(&mut middle[read..]).expect("read");
    // SAFETY: the part is of `received`, borrowed for the length of the call.
    unsafe { destination.read_guest(&mut [iovec(rest)]) }.expect("read");
    assert!(received == pattern(100_000));
    assert!(!destination.readable_within(Duration::ZERO).expect("asked"));
    let mut answer = [0; 6];
    source.read_exact(&mut answer).expect("read");
    assert_eq!(&answer, b"answer");
}

#[test]
fn a_closer_ends_a_blocked_read_and_does_not_keep_the_connection() {
    for tls in [false, true] {
        let (mut source, mut destination) = pair(tls);
        let closer = source.closer().expect("a closer");
        let (waiting, waits) = mpsc::channel();
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                waiting.send(()).expect("still there");
                source.read(&mut [0])
            });
            waits.recv().expect("a reader");
            closer.clone().close();
            let read = reader.join().expect("no panic");
            assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        });
        assert_eq!(destination.read(&mut [0]).expect("an end"), 0);

        let (source, mut destination) = pair(tls);
        let closer = source.closer().expect("a closer");
        drop(source);
        assert_eq!(destination.read(&mut [0]).expect("an end"), 0);
        closer.close();
    }
}

#[test]
fn a_closer_ends_the_wait_for_a_source() {
    let path = tempfile::tempdir().expect("a directory");
    for address in [
        Address::Tcp((Ipv4Addr::LOCALHOST, 0).into()),
        Address::Unix(path.path().join("m.sock")),
    ] {
        let listener = Listener::bind(&address).expect("bound");
        let closer = listener.closer().expect("a closer");
        thread::scope(|scope| {
            let accepting = scope.spawn(|| listener.accept_raw(soon()));
            closer.close();
            assert!(matches!(
                accepting.join().expect("no panic"),
                Err(AcceptError::Closed)
            ));
        });
    }
    let listener = loopback();
    assert!(matches!(
        listener.accept(None, Instant::now()),
        Err(AcceptError::NobodyCame)
    ));
}

#[test]
fn a_half_dead_peer_is_noticed_in_both_directions() {
    for tls in [false, true] {
        let (mut source, destination) = pair(tls);
        source
            .set_timeouts(Some(Duration::from_millis(100)))
            .expect("set");
        let error = source.read(&mut [0]).expect_err("nothing comes");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        // It takes nothing; sooner or later the buffers are full.
        let mut block = vec![0; 1 << 20];
        let error = loop {
            // SAFETY: the part is `block`, borrowed for the length of the call.
            if let Err(error) = unsafe { source.write_guest(&mut [iovec(&mut block)]) } {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        if tls {
            // Half a record is on the way: nothing may follow.
            let error = source.write_all(b"more").expect_err("broken");
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        }
        drop(destination);
    }
}

#[test]
fn damage_on_the_way_is_noticed() {
    let authority = Authority::new("test");
    let (a, b) = (authority.identity("a", "b"), authority.identity("b", "a"));
    let listener = loopback();
    let middle = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = Address::Tcp(middle.local_addr().expect("an address"));
    let Address::Tcp(behind) = *listener.local_address() else {
        unreachable!("bound to TCP");
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut source, _) = middle.accept().expect("accepted");
            let mut destination = TcpStream::connect(behind).expect("connected");
            let mut back = destination.try_clone().expect("cloned");
            let mut to_source = source.try_clone().expect("cloned");
            scope.spawn(move || std::io::copy(&mut back, &mut to_source));
            // The handshake of the source, and its first record, pass; one bit of what is large does not.
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                if count == buffer.len() {
                    buffer[2000] ^= 1;
                }
                if destination.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            let _ = destination.shutdown(std::net::Shutdown::Both);
        });
        let accepting = scope.spawn(|| listener.accept(Some(&b), soon()).expect("accepted").0);
        let mut source = Transport::connect(&address, Some(&a), PLENTY).expect("connected");
        let mut destination = accepting.join().expect("no panic");
        source.write_all(&[1; 16384]).expect("sent");
        let error = destination
            .read_exact(&mut [0; 16384])
            .expect_err("damaged")
            .to_string();
        assert!(error.contains("cannot decrypt"), "{error}");
        drop(source);
    });
}

fn unix_pair() -> (Transport, Transport) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("m.sock");
    let address = Address::Unix(path.clone());
    let authority = Authority::new("test");
    let listener = Listener::bind(&address).expect("bound");
    // Neither side uses TLS on a Unix socket, whatever it has.
    let connected =
        Transport::connect(&address, Some(&authority.identity("a", "b")), PLENTY).expect("connected");
    let (accepted, peer) = listener
        .accept(Some(&authority.identity("b", "a")), soon())
        .expect("accepted");
    assert_eq!(peer, "this host");
    drop(listener);
    assert!(!Path::new(&path).exists());
    for side in [&connected, &accepted] {
        side.set_timeouts(Some(PLENTY)).expect("set");
    }
    (connected, accepted)
}

#[test]
fn a_descriptor_goes_over_a_unix_socket_only() {
    let (mut source, mut destination) = unix_pair();
    assert!(source.local_host() && !source.is_tls());
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(b"memory").expect("written");
    source.send_descriptor(file.as_fd()).expect("sent");
    let mut received = std::fs::File::from(destination.receive_descriptor().expect("received"));
    let mut text = String::new();
    std::io::Seek::rewind(&mut received).expect("rewound");
    received.read_to_string(&mut text).expect("read");
    assert_eq!(text, "memory");

    source.write_all(b"D").expect("written");
    assert!(destination.receive_descriptor().is_err());
    let (mut source, _destination) = pair(false);
    assert!(source.send_descriptor(file.as_fd()).is_err());
}

#[test]
fn files_that_do_not_fit_are_named() {
    let authority = Authority::new("test");
    authority.issue("a", &Issue::default());
    authority.issue("b", &Issue::default());
    let good = authority.files("a", "b");
    let fails = |change: &dyn Fn(&mut MigrationTls)| {
        let mut files = good.clone();
        change(&mut files);
        Identity::load(&files).expect_err("does not fit").to_string()
    };
    let error = fails(&|files| files.ca_path.push('x'));
    assert!(
        error.starts_with("ca_path: reading ") && error.contains("ca.pemx"),
        "{error}"
    );
    let error = fails(&|files| files.certificate_path.clone_from(&files.key_path));
    assert!(
        error.starts_with("certificate_path: ") && error.contains("no certificate in it"),
        "{error}"
    );
    let error = fails(&|files| files.key_path.clone_from(&files.ca_path));
    assert!(
        error.starts_with("key_path: ") && error.contains("no private key in it"),
        "{error}"
    );
    let error = fails(&|files| files.key_path = authority.files("b", "a").key_path);
    assert!(error.contains("not the key of the certificate in"), "{error}");
    let error = fails(&|files| files.ca_path = "/dev/zero".into());
    assert!(error.contains("not a regular file"), "{error}");
    authority.write("big", "pem", &"x".repeat(300 << 10));
    let error = fails(&|files| files.ca_path = authority.files("big", "a").certificate_path);
    assert!(error.contains("over the limit of 256 KiB"), "{error}");
    for name in ["", "10.0.0.1", "1", "a b", "-"] {
        let error = fails(&|files| files.peer_name = name.into());
        assert!(error.starts_with("peer_name: "), "{name}: {error}");
    }
    let shown = format!("{:?}", Identity::load(&good).expect("an identity"));
    assert!(
        !shown.contains("PRIVATE") && shown.contains("peer_name"),
        "{shown}"
    );
}

/// `cargo test --release -p shoal-vmm throughput -- --ignored --nocapture`; a figure, not a check.
#[test]
#[ignore = "measures; for a quiet machine"]
fn throughput_of_each_kind() {
    const TOTAL: usize = 2 << 30;
    const FRAME: usize = 1 << 20;
    for (name, (mut source, mut destination)) in
        [("TCP", pair(false)), ("TLS", pair(true)), ("Unix", unix_pair())]
    {
        let mut sent = pattern(64 << 20);
        let started = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                for at in 0..TOTAL / FRAME {
                    // SAFETY: the part is of `sent`, borrowed for the length of the scope, and only read.
                    unsafe { source.write_guest(&mut [iovec(&mut sent[at % 64 * FRAME..][..FRAME])]) }
                        .expect("sent");
                }
            });
            let mut received = vec![1u8; FRAME];
            for _ in 0..TOTAL / FRAME {
                // SAFETY: the part is `received`, borrowed for the length of the call.
                unsafe { destination.read_guest(&mut [iovec(&mut received)]) }.expect("received");
            }
        });
        let mib = TOTAL >> 20;
        eprintln!(
            "{name}: {:.0} MiB/s",
            f64::from(u32::try_from(mib).expect("small")) / started.elapsed().as_secs_f64()
        );
    }
}
