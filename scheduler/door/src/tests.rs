use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_stream::StreamExt as _;

use super::*;
use crate::frames::{Frames, HEADER, HEADERS, PREFACE};

const LIMITS: Limits = Limits {
    greeting: Duration::from_secs(60),
    of_one: 3,
    of_all: 100,
};
const DATA: u8 = 0;
const SETTINGS: u8 = 4;
const PING: u8 = 6;

async fn door(limits: Limits) -> (Door, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    (Door::new(listener, limits), address)
}

async fn next(door: &mut Door) -> Guest {
    door.next().await.expect("it goes on").expect("accepted")
}

fn frame(kind: u8, length: u8) -> Vec<u8> {
    let mut frame = vec![0, 0, length, kind, 0, 0, 0, 0, 0];
    // Looks like the beginning of a call to who takes it for the head of a frame.
    frame.extend([HEADERS].repeat(length.into()));
    frame
}

/// What a client sends that greets and acknowledges, but calls nothing.
fn greeting() -> Vec<u8> {
    [
        [b'x'; PREFACE].to_vec(),
        frame(SETTINGS, 0),
        frame(SETTINGS, 18),
        frame(PING, 8),
    ]
    .concat()
}

/// A client on this address of loopback that has said so much, which the other side has read, and the other side.
async fn connected(door: &mut Door, to: SocketAddr, from: u8, said: &[u8]) -> (TcpStream, Guest) {
    let socket = TcpSocket::new_v4().expect("a socket");
    let from = SocketAddr::from((Ipv4Addr::new(127, 0, 0, from), 0));
    socket.bind(from).expect("bound");
    let mut client = socket.connect(to).await.expect("connected");
    client.write_all(said).await.expect("sent");
    let mut guest = next(door).await;
    let mut heard = vec![0; said.len()];
    guest.read_exact(&mut heard).await.expect("heard");
    (client, guest)
}

async fn assert_was_closed(guest: &mut Guest) {
    for _ in 0..2 {
        let error = guest.read_u8().await.expect_err("closed");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        let error = guest.write_u8(1).await.expect_err("closed");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }
}

async fn assert_is_open((client, guest): &mut (TcpStream, Guest)) {
    client.write_u8(b'?').await.expect("sent");
    assert_eq!(guest.read_u8().await.expect("open"), b'?');
    guest.write_u8(b'!').await.expect("sent");
    assert_eq!(client.read_u8().await.expect("open"), b'!');
}

/// A connection from this address is closed at once.
async fn assert_is_refused(door: &mut Door, to: SocketAddr) {
    let mut client = TcpStream::connect(to).await.expect("the kernel takes it");
    let mut byte = [0];
    let refused = tokio::select! {
        _ = door.next() => panic!("one too many"),
        read = client.read(&mut byte) => read,
    };
    assert!(matches!(refused, Ok(0) | Err(_)), "it is closed at once");
}

#[tokio::test]
async fn who_does_not_greet_in_time_is_sent_away_and_who_does_may_be_silent_then() {
    let limits = Limits {
        greeting: Duration::from_millis(50),
        of_one: 10,
        ..LIMITS
    };
    let (mut door, address) = door(limits).await;
    for said in [0, PREFACE - 1] {
        let mut client = TcpStream::connect(address).await.expect("connected");
        client.write_all(&vec![b'x'; said]).await.expect("sent");
        let mut guest = next(&mut door).await;
        let mut heard = Vec::new();
        let error = guest.read_to_end(&mut heard).await.expect_err("too late");
        assert_eq!((error.kind(), heard.len()), (io::ErrorKind::TimedOut, said));
    }
    let mut client = TcpStream::connect(address).await.expect("connected");
    client.write_all(&[b'x'; PREFACE]).await.expect("sent");
    let mut guest = next(&mut door).await;
    let mut heard = [0; PREFACE];
    guest.read_exact(&mut heard).await.expect("greeted");
    let later = async {
        tokio::time::sleep(3 * limits.greeting).await;
        client.write_all(b"y").await
    };
    let (sent, read) = tokio::join!(later, guest.read_u8());
    sent.expect("sent");
    assert_eq!(read.expect("no limit any more"), b'y');
}

#[tokio::test]
async fn the_oldest_connection_of_an_address_without_a_call_goes_for_the_next() {
    let (mut door, address) = door(LIMITS).await;
    let call = [greeting(), frame(HEADERS, 5)].concat();
    let mut caller = connected(&mut door, address, 1, &call).await;
    let mut stranger = connected(&mut door, address, 2, &greeting()).await;
    let (_client, mut first) = connected(&mut door, address, 1, &greeting()).await;
    let mut second = connected(&mut door, address, 1, &greeting()).await;

    // One that waits for what may come learns of it, too.
    let (mut newest, ()) = tokio::join!(
        connected(&mut door, address, 1, &call),
        assert_was_closed(&mut first)
    );
    for still in [&mut caller, &mut stranger, &mut second, &mut newest] {
        assert_is_open(still).await;
    }
    // Its end is not counted twice.
    drop(first);
    let newer = connected(&mut door, address, 1, &call).await;
    assert_was_closed(&mut second.1).await;
    assert_is_refused(&mut door, address).await;
    drop(newer);
    connected(&mut door, address, 1, &[]).await;
}

#[tokio::test]
async fn the_oldest_connection_of_all_without_a_call_goes_when_there_are_too_many() {
    let limits = Limits { of_all: 3, ..LIMITS };
    let (mut door, address) = door(limits).await;
    let call = [greeting(), frame(HEADERS, 5)].concat();
    let _caller = connected(&mut door, address, 1, &call).await;
    let mut first = connected(&mut door, address, 2, &[]).await;
    let mut second = connected(&mut door, address, 3, &greeting()).await;
    let _third = connected(&mut door, address, 4, &call).await;
    assert_was_closed(&mut first.1).await;
    assert_is_open(&mut second).await;
    let fourth = connected(&mut door, address, 5, &call).await;
    assert_was_closed(&mut second.1).await;
    assert_is_refused(&mut door, address).await;
    drop(fourth);
    connected(&mut door, address, 1, &[]).await;
}

#[tokio::test]
async fn a_call_that_comes_after_its_place_was_given_away_is_not_heard() {
    let limits = Limits { of_one: 1, ..LIMITS };
    let (mut door, address) = door(limits).await;
    let (mut client, mut first) = connected(&mut door, address, 1, &greeting()).await;
    client.write_all(&frame(HEADERS, 5)).await.expect("sent");
    let mut second = connected(&mut door, address, 1, &frame(HEADERS, 5)).await;
    assert_was_closed(&mut first).await;
    drop(first);
    assert_is_open(&mut second).await;
}

#[test]
fn a_call_is_found_however_the_bytes_come() {
    let before = [greeting(), frame(DATA, 255), frame(PING, 8)].concat();
    let all = [before.clone(), frame(HEADERS, 7), frame(SETTINGS, 0)].concat();
    let begins = before.len() + HEADER;
    for size in 1..=all.len() {
        let mut frames = Frames::new();
        let mut heard = 0;
        for piece in all.chunks(size) {
            frames.hear(piece);
            heard += piece.len();
            assert_eq!(
                frames.have_greeting(),
                heard >= PREFACE,
                "{heard} in pieces of {size}"
            );
            assert_eq!(frames.have_call(), heard >= begins, "{heard} in pieces of {size}");
        }
    }
}

#[test]
fn connections_get_half_of_the_descriptors_and_one_address_not_all_of_them() {
    let of = |most| {
        let Limits { of_one, of_all, .. } = Limits::with_descriptors(most);
        (of_one, of_all)
    };
    assert_eq!(of(Some(0)), (1, 1));
    assert_eq!(of(Some(100)), (27, 36));
    assert_eq!(of(Some(1024)), (384, 512));
    assert_eq!(of(Some(20_000)), (512, 10_000));
    assert_eq!(of(None).0, 512);
}
