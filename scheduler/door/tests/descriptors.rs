//! A process that is out of file descriptors. In a program of its own, as the limit is of the process.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shoal_door::{Door, Limits};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::{Stream as _, StreamExt as _};

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn without_descriptors_the_door_waits_and_goes_on_when_there_are_some() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let mut door = Door::new(listener, Limits::of_this_process());
    let _first = TcpStream::connect(address).await.expect("connected");
    let accepted = door.next().await.expect("it goes on").expect("accepted");
    let _second = TcpStream::connect(address).await.expect("connected");
    let before = getrlimit(Resource::Nofile);
    let none = Rlimit {
        current: Some(3),
        ..before
    };
    setrlimit(Resource::Nofile, none).expect("set");

    // The second is there when the socket can be read, which one turn of the runtime tells.
    tokio::task::yield_now().await;
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let poll = Pin::new(&mut door).poll_next(&mut Context::from_waker(&waker));
    assert!(
        matches!(poll, Poll::Pending),
        "no error for the server to spin on"
    );
    assert_eq!(
        wakes.0.load(Ordering::SeqCst),
        0,
        "and no wish to be asked at once"
    );
    // It tries more than once.
    let none = tokio::time::timeout(std::time::Duration::from_millis(350), door.next()).await;
    none.expect_err("still without");

    setrlimit(Resource::Nofile, before).expect("set");
    door.next().await.expect("it goes on").expect("accepted");
    drop(accepted);
}
