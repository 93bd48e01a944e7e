//! Both sides in one process, over TCP: threads that touch memory stand for the guest.

use std::collections::BTreeSet;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::Links;
use super::destination::{Event, PostCopy};
use super::frames::{self, PageFrame, Status};
use super::page_set::PageSet;
use super::source::{BELIEVED_AFTER, Heard, NotConnected, PREFETCH_PAGES, Pace, PageServer};
use crate::memory::{Backing, GuestMemory};
use crate::migration::pacer::Pacer;
use crate::migration::wire::{Connection, FrameKind};
use crate::spec::PAGE_SIZE;

const MEMORY: u64 = 16 << 20;
const PAGES: u64 = MEMORY / PAGE_SIZE;
const LONG: Duration = Duration::from_secs(30);

type Ends = (Connection<TcpStream>, Links<TcpStream>);

/// Both ends of a set of connections, and what cuts them.
fn connected(connections: usize) -> (Ends, Ends, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let address = listener.local_addr().expect("its address");
    let mut wires = vec![];
    let mut pair = || {
        let source = TcpStream::connect(address).expect("connected");
        let (destination, _) = listener.accept().expect("accepted");
        for stream in [&source, &destination] {
            stream.set_nodelay(true).expect("a socket");
            stream.set_read_timeout(Some(LONG)).expect("a socket");
            stream.set_write_timeout(Some(LONG)).expect("a socket");
        }
        wires.push(source.try_clone().expect("a descriptor"));
        (Connection::new(source), Connection::new(destination))
    };
    let (source_control, destination_control) = pair();
    let (source_requests, destination_requests) = pair();
    let (source_answers, destination_answers) = pair();
    let (source_pages, destination_pages) = (0..connections).map(|_| pair()).unzip();
    let links = |pages, fault_requests, fault_pages| Links {
        pages,
        fault_requests,
        fault_pages,
    };
    let source = (
        source_control,
        links(source_pages, source_requests, source_answers),
    );
    let destination = (
        destination_control,
        links(destination_pages, destination_requests, destination_answers),
    );
    (source, destination, wires)
}

fn cut(wires: &[TcpStream]) {
    for wire in wires {
        // It may have ended by itself.
        let _ = wire.shutdown(std::net::Shutdown::Both);
    }
}

fn host(memory: &GuestMemory, page: u64) -> *mut u64 {
    memory
        .host_range(GuestAddress(page * PAGE_SIZE), PAGE_SIZE)
        .expect("guest memory")
        .cast()
}

/// Reads a page's first word as a vCPU would: waits if it is missing.
fn touch(memory: &GuestMemory, page: u64) -> u64 {
    // SAFETY: mapped guest memory, aligned; volatile, as other threads may write it.
    unsafe { host(memory, page).read_volatile() }
}

fn write(memory: &GuestMemory, page: u64, value: u64) {
    // SAFETY: as above.
    unsafe { host(memory, page).add(1).write_volatile(value) };
}

/// Every third page has content; a stale copy of all of it is at the destination.
fn content(page: u64) -> u64 {
    if page.is_multiple_of(3) {
        page ^ 0x5ca1_ab1e
    } else {
        0
    }
}

struct Both {
    source: GuestMemory,
    destination: GuestMemory,
    missing: BTreeSet<u64>,
}

impl Both {
    fn new(missing: impl IntoIterator<Item = u64>) -> Self {
        Self::with_backing(missing, Backing::Anonymous)
    }

    fn with_backing(missing: impl IntoIterator<Item = u64>, backing: Backing) -> Self {
        let source = GuestMemory::new(MEMORY).expect("map");
        let destination = GuestMemory::with_backing(MEMORY, backing).expect("map");
        let missing: BTreeSet<u64> = missing.into_iter().collect();
        for page in 0..PAGES {
            let (at, value) = (GuestAddress(page * PAGE_SIZE), content(page));
            if value != 0 {
                source.mmap().write_obj(value, at).expect("inside");
            }
            let there = if missing.contains(&page) { !value } else { value };
            if there != 0 {
                destination.mmap().write_obj(there, at).expect("inside");
            }
        }
        Self {
            source,
            destination,
            missing,
        }
    }

    fn missing(&self) -> PageSet {
        let set = PageSet::empty(&self.source.regions());
        for &page in &self.missing {
            assert!(set.insert_run(page, 1));
        }
        set
    }

    fn assert_moved(&self) {
        for page in 0..PAGES {
            assert_eq!(touch(&self.destination, page), content(page), "page {page}");
        }
    }
}

/// The destination's side: post-copy goes on in a thread, which takes new connections from a channel.
struct Destination {
    post_copy: PostCopy,
    new_ends: Option<Sender<Ends>>,
    events: Receiver<Event>,
    thread: std::thread::JoinHandle<()>,
}

fn start_destination(both: &Both, ends: Ends) -> Destination {
    let post_copy = PostCopy::prepare(&both.destination, &both.missing()).expect("userfaultfd");
    let session = post_copy.attach(ends.1).expect("threads");
    assert!(post_copy.outlive_links());
    let ((new_ends, accepted), (told, events)) = (channel::<Ends>(), channel());
    let told = Mutex::new(told);
    let running = post_copy.clone();
    let accept = move |stopped: &dyn Fn() -> bool, _: Option<Instant>| {
        loop {
            match accepted.recv_timeout(Duration::from_millis(20)) {
                Ok(ends) => return Some(ends),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(_) if stopped() => return None,
                Err(_) => {}
            }
        }
    };
    let thread = std::thread::spawn(move || {
        running.run(session, ends.0, accept, |event| {
            told.lock()
                .expect("no panic")
                .send(event)
                .expect("the test listens");
        });
    });
    Destination {
        post_copy,
        new_ends: Some(new_ends),
        events,
        thread,
    }
}

impl Destination {
    fn next_event(&self) -> Event {
        self.events.recv_timeout(LONG).expect("an event")
    }
}

/// As fast as it goes; told before each batch of the background stream.
struct Before<F>(F);

impl<F: Fn() + Sync> Pace for Before<F> {
    fn wait(&self, _: usize, _: &dyn Fn() -> bool) {
        (self.0)();
    }

    fn may_send_now(&self, _: usize) -> bool {
        true
    }

    fn owe(&self, _: usize) {}
}

static FREELY: Before<fn()> = Before(|| ());

/// The source's side of one session. Gives the last status, or why it ended.
fn serve(server: &PageServer<'_>, (mut control, links): Ends) -> Result<Status, String> {
    std::thread::scope(|scope| {
        let session = server.serve(scope, links, &FREELY).expect("threads");
        session.open_background();
        server
            .follow(&session, &mut control, &AtomicBool::new(false), |_| {})
            .map_err(|error| error.to_string())
    })
}

#[test]
fn a_guest_runs_while_its_memory_arrives() {
    for (connections, backing) in [
        (1, Backing::Anonymous),
        (3, Backing::Anonymous),
        (2, Backing::Shared),
    ] {
        let both = Both::with_backing((0..PAGES - 64).filter(|page| page % 7 != 0), backing);
        let (source_ends, destination_ends, _) = connected(connections);
        let mut destination = start_destination(&both, destination_ends);
        let moved = AtomicU64::new(0);
        std::thread::scope(|scope| {
            // Two vCPUs, from both ends, that read, check and write.
            for vcpu in 0..2u64 {
                let (both, moved) = (&both, &moved);
                scope.spawn(move || {
                    for step in 0..PAGES {
                        let page = if vcpu == 0 { step } else { PAGES - 1 - step };
                        assert_eq!(touch(&both.destination, page), content(page), "page {page}");
                        if page % 2 == vcpu {
                            write(&both.destination, page, step);
                        }
                        moved.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let server = PageServer::new(&both.source, both.missing(), vec![]);
            let last = serve(&server, source_ends).expect("complete");
            assert!(last.complete && last.missing_pages == 0, "{last:?}");
            assert!(server.pages_sent() >= both.missing.len() as u64);
        });
        assert_eq!(destination.next_event(), Event::Complete);
        assert_eq!(moved.load(Ordering::Relaxed), 2 * PAGES);
        assert_eq!(destination.post_copy.missing_pages(), 0);
        destination.new_ends.take();
        destination.thread.join().expect("no panic");
        both.assert_moved();
    }
}

#[test]
fn what_is_written_at_the_source_after_the_first_list_is_missing_too() {
    let both = Both::new(0..PAGES / 2);
    let post_copy = PostCopy::prepare(&both.destination, &both.missing()).expect("userfaultfd");
    // Two pages that came in pre-copy, and two that are on the list already.
    let later = PageSet::empty(&both.source.regions());
    for page in [6, 9, PAGES - 3, PAGES - 1] {
        both.source
            .mmap()
            .write_obj(page + 1, GuestAddress(page * PAGE_SIZE))
            .expect("inside");
        later.insert_run(page, 1);
    }
    post_copy.add(&later).expect("userfaultfd");
    assert_eq!(post_copy.missing_pages(), PAGES / 2 + 2);
    let (source_ends, destination_ends, _wires) = connected(1);
    let session = post_copy.attach(destination_ends.1).expect("threads");
    assert!(post_copy.outlive_links());
    let all = both.missing();
    all.insert(&later);
    let running = post_copy.clone();
    let thread = std::thread::spawn(move || running.run(session, destination_ends.0, |_, _| None, |_| {}));
    let server = PageServer::new(&both.source, all, vec![]);
    serve(&server, source_ends).expect("complete");
    thread.join().expect("no panic");
    for page in 0..PAGES {
        let written = [6, 9, PAGES - 3, PAGES - 1].contains(&page);
        let expected = if written { page + 1 } else { content(page) };
        assert_eq!(touch(&both.destination, page), expected, "page {page}");
    }
}

#[test]
fn without_a_background_stream_faults_bring_what_is_touched_and_what_lies_around() {
    let both = Both::new(0..PAGES);
    let (source_ends, destination_ends, wires) = connected(1);
    let destination = start_destination(&both, destination_ends);
    std::thread::scope(|scope| {
        let server = PageServer::new(&both.source, both.missing(), vec![]);
        let (mut control, links) = source_ends;
        std::thread::scope(|inner| {
            let session = server.serve(inner, links, &FREELY).expect("threads");
            let guest = scope.spawn(|| {
                for page in [999, 16, 3000] {
                    assert_eq!(touch(&both.destination, page), content(page));
                }
            });
            guest.join().expect("the guest goes on");
            let heard = server.follow(&session, &mut control, &AtomicBool::new(false), |status| {
                if status.missing_pages == PAGES - 3 * PREFETCH_PAGES {
                    assert!(
                        status.faults == 3 && status.worst_fault_us <= status.fault_us,
                        "{status:?}"
                    );
                    cut(&wires);
                }
            });
            heard.expect_err("cut");
        });
    });
    assert!(matches!(destination.next_event(), Event::LinkLost(_)));
    destination.post_copy.stop("the test is over");
    destination.thread.join().expect("no panic");
}

/// A pacer that counts what it lets through.
struct Counting {
    pacer: Pacer,
    owed: AtomicUsize,
    ahead: AtomicUsize,
}

impl Pace for Counting {
    fn wait(&self, bytes: usize, is_over: &dyn Fn() -> bool) {
        self.pacer.wait(bytes, is_over);
    }

    fn may_send_now(&self, bytes: usize) -> bool {
        let may = self.pacer.may_send_now(bytes);
        if may {
            self.ahead.fetch_add(bytes, Ordering::SeqCst);
        }
        may
    }

    fn owe(&self, bytes: usize) {
        self.owed.fetch_add(bytes, Ordering::SeqCst);
        self.pacer.owe(bytes);
    }
}

#[test]
fn under_a_cap_a_guest_never_waits_for_its_page_and_what_lies_around_comes_when_there_is_room() {
    let both = Both::new(0..PAGES);
    let (source_ends, destination_ends, wires) = connected(1);
    let destination = start_destination(&both, destination_ends);
    // A byte a second: after the first page there is no room for years.
    let pace = Counting {
        pacer: Pacer::new(1),
        owed: AtomicUsize::new(0),
        ahead: AtomicUsize::new(0),
    };
    let touched = [999, 16, 3000, 17, 18];
    std::thread::scope(|scope| {
        let server = PageServer::new(&both.source, both.missing(), vec![]);
        let (mut control, links) = source_ends;
        std::thread::scope(|inner| {
            let session = server.serve(inner, links, &pace).expect("threads");
            let guest = scope.spawn(|| {
                for page in touched {
                    assert_eq!(touch(&both.destination, page), content(page));
                }
            });
            guest.join().expect("the guest goes on");
            cut(&wires);
            let heard = server.follow(&session, &mut control, &AtomicBool::new(false), |_| {});
            heard.expect_err("cut");
        });
    });
    let page = usize::try_from(PAGE_SIZE).expect("4096");
    assert_eq!(pace.owed.load(Ordering::SeqCst), touched.len() * page);
    assert_eq!(pace.ahead.load(Ordering::SeqCst), 0, "nothing was sent unasked");
    assert!(matches!(destination.next_event(), Event::LinkLost(_)));
    destination.post_copy.stop("the test is over");
    destination.thread.join().expect("no panic");
}

#[test]
fn what_breaks_is_taken_up_again_until_all_is_there() {
    let both = Both::new((0..PAGES).filter(|page| page % 5 != 1));
    let (source_ends, destination_ends, wires) = connected(2);
    let mut destination = start_destination(&both, destination_ends);
    let recoveries = AtomicU64::new(0);
    let cut_next = Mutex::new(wires);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut page = 1;
            for _ in 0..PAGES {
                // An odd step visits every page once, in an order that nothing can guess.
                page = (page + 1_867) % PAGES;
                assert_eq!(touch(&both.destination, page), content(page), "page {page}");
            }
        });
        let sent = AtomicU64::new(0);
        // Every so many pages all connections break, in the middle of whatever they carry.
        let pace = Before(|| {
            if sent.fetch_add(1, Ordering::SeqCst) % 5 == 4 {
                cut(&cut_next.lock().expect("no panic"));
            }
        });
        let mut server = PageServer::new(&both.source, both.missing(), vec![]);
        let (mut control, links) = source_ends;
        let never = AtomicBool::new(false);
        let first = std::thread::scope(|inner| {
            let session = server.serve(inner, links, &pace).expect("threads");
            session.open_background();
            server.follow(&session, &mut control, &never, |_| {})
        });
        first.expect_err("cut in the middle");
        let connect = || {
            let (source, end, wires) = connected(2);
            *cut_next.lock().expect("no panic") = wires;
            let sent = destination.new_ends.as_ref().expect("not yet taken").send(end);
            sent.map_err(|_| NotConnected {
                why: "the destination does not listen".to_owned(),
                can_pass: true,
            })?;
            Ok(source)
        };
        let last = server.recover(connect, &pace, &never, |heard, _| {
            if let Heard::Recovered = heard {
                recoveries.fetch_add(1, Ordering::SeqCst);
            }
        });
        let last = last.expect("not stopped");
        assert!(last.complete && last.faults > 0, "{last:?}");
        guest.join().expect("the guest saw only what was right");
    });
    assert!(recoveries.load(Ordering::SeqCst) >= 2);
    destination.new_ends.take();
    destination.thread.join().expect("no panic");
    let events: Vec<Event> = destination.events.iter().collect();
    assert_eq!(
        events.iter().filter(|event| **event == Event::Complete).count(),
        1,
        "{events:?}"
    );
    assert!(events.contains(&Event::Recovered), "{events:?}");
    both.assert_moved();
}

#[test]
fn what_cannot_pass_is_not_tried_for_ever_and_the_memory_is_kept() {
    let both = Both::new(0..PAGES);
    let stop = AtomicBool::new(false);
    let (mut tried, mut said) = (0, vec![]);
    let mut server = PageServer::new(&both.source, both.missing(), vec![]);
    let connect = || {
        tried += 1;
        // One that can pass begins the count anew.
        let can_pass = tried == 2;
        let why = "not a Shoal migration stream".to_owned();
        Err::<Ends, _>(NotConnected { why, can_pass })
    };
    std::thread::scope(|scope| {
        let (tell, told) = channel();
        let stop = &stop;
        scope.spawn(move || {
            let last = told
                .iter()
                .find(|why: &String| why.contains("it is not tried again"));
            assert!(last.is_some_and(|why| why.contains("the memory is kept")));
            // Two more rounds at least, in which nothing is tried.
            std::thread::sleep(2 * super::RECONNECT_EVERY);
            stop.store(true, Ordering::SeqCst);
        });
        let ended = server.recover(connect, &FREELY, stop, |heard, _| {
            if let Heard::LinkLost(why) = heard {
                said.push(why.to_owned());
                tell.send(why.to_owned()).expect("the test listens");
            }
        });
        assert_eq!(ended, None);
    });
    assert_eq!(tried, 2 + BELIEVED_AFTER);
    assert_eq!(said.len(), usize::try_from(tried).expect("small"));
    assert_eq!(server.pages_sent(), 0);
}

#[test]
fn a_guest_that_waits_can_be_stopped_and_the_source_hears_it() {
    let both = Both::new(0..PAGES);
    let (source_ends, destination_ends, wires) = connected(1);
    let destination = start_destination(&both, destination_ends);
    let (mut control, links) = source_ends;
    let mut requests = links.fault_requests;
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| touch(&both.destination, 5));
        // Nobody answers what it asks for.
        let (kind, asked) = requests.receive().expect("a request");
        assert_eq!(kind, FrameKind::FaultRequest);
        assert_eq!(frames::requests(&both.source, &asked).expect("its own"), [5]);
        destination.post_copy.stop("stopped on request");
        assert_eq!(guest.join().expect("it goes on"), 0);
    });
    loop {
        let status: Status = control
            .expect(FrameKind::PostStatus, "PostStatus")
            .expect("a status");
        if status.complete {
            assert_eq!(status.ended, "stopped on request");
            break;
        }
        control
            .send_parts(FrameKind::PostAck, &[], &[])
            .expect("it listens");
    }
    cut(&wires);
    destination.thread.join().expect("no panic");
    assert!(
        destination.events.try_recv().is_err(),
        "the owner stopped it, and needs no event"
    );
}

/// Whoever waits when all are let go of looks again, and may be faster than the kernel, which first wakes and then stops
/// holding back. More threads than CPUs, so that one of them often preempts who let go of them.
#[test]
fn whoever_looks_again_when_pages_are_no_longer_held_back_goes_on() {
    const GUESTS: u64 = 8;
    let both = Arc::new(Both::new(0..GUESTS));
    for round in 0..2000 {
        let post_copy = PostCopy::prepare(&both.destination, &both.missing()).expect("userfaultfd");
        let (first_touch, touched) = channel();
        let (over, ended) = channel();
        for vcpu in 0..GUESTS {
            let (guest, first_touch, over) = (Arc::clone(&both), first_touch.clone(), over.clone());
            std::thread::spawn(move || {
                first_touch.send(()).expect("the test listens");
                assert_eq!(touch(&guest.destination, vcpu), 0);
                over.send(()).expect("the test listens");
            });
        }
        for _ in 0..GUESTS {
            touched.recv().expect("a guest runs");
        }
        post_copy.stop("it is over");
        for _ in 0..GUESTS {
            ended
                .recv_timeout(LONG)
                .unwrap_or_else(|_| panic!("round {round}: a guest waits for ever"));
        }
    }
}

#[test]
fn a_source_that_is_stopped_says_that_the_memory_is_lost() {
    let both = Both::new(0..PAGES);
    let (source_ends, destination_ends, _wires) = connected(1);
    let destination = start_destination(&both, destination_ends);
    let server = PageServer::new(&both.source, both.missing(), vec![]);
    let (mut control, links) = source_ends;
    let error = std::thread::scope(|scope| {
        let session = server.serve(scope, links, &FREELY).expect("threads");
        server
            .follow(&session, &mut control, &AtomicBool::new(true), |_| {})
            .expect_err("stopped")
            .to_string()
    });
    assert!(error.contains("the source was stopped"), "{error}");
    match destination.next_event() {
        Event::Lost(why) => assert!(why.contains("is lost"), "{why}"),
        other => panic!("{other:?}"),
    }
    destination.post_copy.stop("memory lost");
    destination.thread.join().expect("no panic");
}

#[test]
fn before_the_state_is_loaded_a_broken_connection_lets_go_of_who_waits() {
    let both = Both::new(0..PAGES);
    let (source_ends, (_control, links), wires) = connected(1);
    let post_copy = PostCopy::prepare(&both.destination, &both.missing()).expect("userfaultfd");
    let session = post_copy.attach(links).expect("threads");
    let mut requests = source_ends.1.fault_requests;
    std::thread::scope(|scope| {
        let loader = scope.spawn(|| touch(&both.destination, 7));
        requests.receive().expect("a request");
        cut(&wires);
        assert_eq!(loader.join().expect("it goes on"), 0);
    });
    assert!(
        !post_copy.outlive_links(),
        "its memory is not what the source has"
    );
    drop(session);
}

#[test]
fn pages_that_come_twice_or_were_never_asked_for_change_nothing() {
    let both = Both::new([0, 3, 6]);
    let (source_ends, (destination_control, links), _wires) = connected(1);
    let post_copy = PostCopy::prepare(&both.destination, &both.missing()).expect("userfaultfd");
    let session = post_copy.attach(links).expect("threads");
    assert!(post_copy.outlive_links());
    let wrong = GuestMemory::new(MEMORY).expect("map");
    for page in [9, 12] {
        wrong
            .mmap()
            .write_obj(u64::MAX, GuestAddress(page * PAGE_SIZE))
            .expect("inside");
    }
    let (_control, mut source_links) = source_ends;
    let mut send = |memory: &GuestMemory, pages: &[u64]| {
        let mut frame = PageFrame::default();
        for &page in pages {
            frame.add(memory, page).expect("inside");
        }
        frame.send(&mut source_links.fault_pages).expect("it listens");
    };
    send(&both.source, &[3]);
    assert_eq!(touch(&both.destination, 3), content(3));
    write(&both.destination, 3, 77);
    send(&both.source, &[3]);
    send(&wrong, &[9, 12, 13]);
    send(&both.source, &[6]);
    // Frames of one connection are placed in their order.
    assert_eq!(touch(&both.destination, 6), content(6));
    for page in [9, 12, 13] {
        assert_eq!(touch(&both.destination, page), content(page), "page {page}");
    }
    // SAFETY: as in `touch`.
    assert_eq!(unsafe { host(&both.destination, 3).add(1).read_volatile() }, 77);
    // A page is counted right after it is placed, and was seen above as soon as that.
    let deadline = Instant::now() + LONG;
    while post_copy.missing_pages() != 1 {
        assert!(
            Instant::now() < deadline,
            "{} pages missing",
            post_copy.missing_pages()
        );
        std::thread::yield_now();
    }
    post_copy.stop("the test is over");
    drop((session, destination_control));
}

#[test]
fn garbage_ends_the_session_and_nothing_else() {
    let both = Both::new(0..PAGES);
    let (source_ends, destination_ends, _wires) = connected(1);
    let destination = start_destination(&both, destination_ends);
    let (_control, mut links) = source_ends;
    links
        .fault_pages
        .send_parts(FrameKind::PostPages, &[0xff; 100], &[])
        .expect("it listens");
    match destination.next_event() {
        Event::LinkLost(why) => assert!(why.contains("PostPages"), "{why}"),
        other => panic!("{other:?}"),
    }
    destination.post_copy.stop("the test is over");
    destination.thread.join().expect("no panic");

    // A destination that asks for what is not there.
    let (mut source_ends, destination_ends, _wires) = connected(1);
    let server = PageServer::new(&both.source, both.missing(), vec![]);
    let (mut control, mut links) = destination_ends;
    links
        .fault_requests
        .send_parts(FrameKind::FaultRequest, &(MEMORY + 1).to_le_bytes(), &[])
        .expect("it listens");
    links
        .fault_pages
        .stream()
        .set_read_timeout(Some(LONG))
        .expect("a socket");
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || links.fault_pages.receive().is_err() && control.receive().is_err());
        let error = std::thread::scope(|inner| {
            let session = server.serve(inner, source_ends.1, &FREELY).expect("threads");
            server
                .follow(&session, &mut source_ends.0, &AtomicBool::new(false), |_| {})
                .expect_err("garbage")
        });
        assert!(
            error.to_string().contains("is not the address of a page"),
            "{error}"
        );
        assert!(asked.join().expect("no panic"), "its connections end");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn whatever_is_missing_comes_hot_pages_first(
        missing in proptest::collection::btree_set(0..PAGES, 1..600),
        hot in proptest::collection::btree_set(0..PAGES, 0..200),
        touched in proptest::collection::vec(0..PAGES, 0..200),
    ) {
        let both = Both::new(missing);
        let hot_set = PageSet::empty(&both.source.regions());
        for &page in &hot {
            hot_set.insert_run(page, 1);
        }
        let (source_ends, destination_ends, _wires) = connected(1);
        let mut destination = start_destination(&both, destination_ends);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for page in touched {
                    assert_eq!(touch(&both.destination, page), content(page), "page {page}");
                }
            });
            let server = PageServer::new(&both.source, both.missing(), vec![hot_set]);
            serve(&server, source_ends).expect("complete");
        });
        destination.new_ends.take();
        destination.thread.join().expect("no panic");
        both.assert_moved();
    }
}

#[test]
fn the_background_stream_sends_hot_pages_before_all_others() {
    let both = Both::new(0..512);
    let hot = PageSet::empty(&both.source.regions());
    hot.insert_run(400, 40);
    let (source_ends, (mut control, links), _wires) = connected(1);
    let server = PageServer::new(&both.source, both.missing(), vec![hot]);
    let order = Arc::new(Mutex::new(Vec::<u64>::new()));
    std::thread::scope(|scope| {
        let (reader, seen) = (&both.destination, Arc::clone(&order));
        scope.spawn(move || {
            let mut pages = links.pages.into_iter().next().expect("one");
            while seen.lock().expect("no panic").len() < 512 {
                let (_, payload) = pages.receive().expect("pages");
                let runs = frames::runs(reader, &payload).expect("its own");
                seen.lock()
                    .expect("no panic")
                    .extend(runs.iter().flat_map(|run| run.first..run.first + run.pages));
            }
            let last = Status {
                complete: true,
                ..Status::default()
            };
            control.send(FrameKind::PostStatus, &last).expect("it listens");
            control.receive().expect("an answer");
        });
        serve(&server, source_ends).expect("complete");
    });
    let order = order.lock().expect("no panic");
    assert_eq!(order[..40], (400..440).collect::<Vec<_>>());
    assert_eq!(order[40..], (0..400).chain(440..512).collect::<Vec<_>>());
}
