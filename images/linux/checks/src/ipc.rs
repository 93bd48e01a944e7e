//! What processes say to each other: pipes, events, local sockets, queues.

use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice, tee};
use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::mqueue;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SaFlags, Signal};
use nix::sys::socket::{self, ControlMessage, ControlMessageOwned, MsgFlags, sockopt};
use nix::unistd::{getpid, read, write};

use crate::check::{Check, Outcome, available, check};
use crate::sys::{Child, PAGE, Scratch, check_stream, handle, send_stream};
use crate::{ensure, ensure_eq, syscall};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("ipc.pipe-stream", pipe_stream),
    check("ipc.pipe-limits", pipe_limits),
    check("ipc.pipe-writers", pipe_writers),
    check("ipc.splice", splicing),
    check("ipc.event-descriptor", event_descriptor),
    check("ipc.epoll", epoll),
    check("ipc.epoll-edges", epoll_edges),
    check("ipc.unix-stream", unix_stream),
    check("ipc.unix-datagrams", unix_datagrams),
    check("ipc.descriptors-passed", descriptors_passed),
    check("ipc.credentials", credentials),
    check("ipc.system-v-messages", system_v_messages),
    check("ipc.system-v-semaphores", system_v_semaphores),
    check("ipc.system-v-memory", system_v_memory),
    check("ipc.posix-queue", posix_queue),
];

const STREAM: usize = 2 << 20;

fn pipe_stream() -> Outcome {
    for seed in 0..2 {
        let (from, to) = std::io::pipe()?;
        let child = Child::start(move || send_stream(to, STREAM, seed))?;
        check_stream(from, STREAM, seed)?;
        child.join()?;
    }
    Ok(())
}

fn pipe_limits() -> Outcome {
    static BROKEN: AtomicU64 = AtomicU64::new(0);
    extern "C" fn broken(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        BROKEN.fetch_add(1, SeqCst);
    }
    let (from, to) = nix::unistd::pipe2(OFlag::O_NONBLOCK)?;
    let mut byte = [0; 1];
    ensure_eq!(read(&from, &mut byte), Err(Errno::EAGAIN), "a read of nothing");
    let mut held = 0;
    while let Ok(count) = write(&to, &[1; PAGE]) {
        held += count;
    }
    let size = usize::try_from(fcntl(&to, FcntlArg::F_GETPIPE_SZ)?)?;
    ensure_eq!(held, size, "bytes in a full pipe");
    fcntl(&to, FcntlArg::F_SETPIPE_SZ(c_int::try_from(2 * size)?))?;
    ensure_eq!(write(&to, &[2; 100])?, 100, "in a larger pipe");
    let mut bytes = vec![0; 3 * size];
    let mut came = 0;
    while let Ok(count) = read(&from, &mut bytes[came..]) {
        came += count;
    }
    ensure!(
        came == size + 100 && bytes[..size].iter().all(|&byte| byte == 1),
        "{came} bytes"
    );
    handle(Signal::SIGPIPE, SaFlags::empty(), broken)?;
    drop(from);
    ensure_eq!(write(&to, b"x"), Err(Errno::EPIPE), "nobody reads");
    ensure_eq!(BROKEN.load(SeqCst), 1, "SIGPIPE");
    Ok(())
}

/// Lines of several writers do not mix.
fn pipe_writers() -> Outcome {
    const LINE: usize = 500;
    let (mut from, to) = std::io::pipe()?;
    let mut children = Vec::new();
    for writer in b'a'..=b'd' {
        let to = to.try_clone()?;
        children.push(Child::start(move || {
            for _ in 0..100 {
                (&to).write_all(&[writer; LINE])?;
            }
            Ok(())
        })?);
    }
    drop(to);
    let mut counts = [0; 4];
    let mut line = [0; LINE];
    for _ in 0..400 {
        from.read_exact(&mut line)?;
        ensure!(line.iter().all(|&byte| byte == line[0]), "lines are mixed");
        counts[usize::from(line[0] - b'a')] += 1;
    }
    ensure_eq!(counts, [100; 4], "lines");
    children.into_iter().try_for_each(Child::join)
}

fn splicing() -> Outcome {
    let (first_out, first_in) = nix::unistd::pipe()?;
    let (second_out, second_in) = nix::unistd::pipe()?;
    let (third_out, third_in) = nix::unistd::pipe()?;
    for round in 0..50u8 {
        write(&first_in, &[round; 5000])?;
        ensure_eq!(
            tee(&first_out, &second_in, 5000, SpliceFFlags::empty())?,
            5000,
            "tee"
        );
        ensure_eq!(
            splice(&first_out, None, &third_in, None, 5000, SpliceFFlags::empty())?,
            5000,
            "splice"
        );
        for end in [&second_out, &third_out] {
            let mut bytes = [0; 5000];
            let mut came = 0;
            while came < 5000 {
                came += read(end, &mut bytes[came..])?;
            }
            ensure!(bytes == [round; 5000], "bytes of round {round}");
        }
    }
    let scratch = Scratch::new()?;
    std::fs::write(scratch.path("source"), vec![7; 10_000])?;
    let source = std::fs::File::open(scratch.path("source"))?;
    ensure_eq!(
        nix::sys::sendfile::sendfile(&first_in, &source, None, 10_000)?,
        10_000,
        "sendfile"
    );
    let mut bytes = vec![0; 10_000];
    std::fs::File::from(first_out).read_exact(&mut bytes)?;
    ensure!(bytes.iter().all(|&byte| byte == 7), "bytes of a file");
    Ok(())
}

fn event_descriptor() -> Outcome {
    let event = available(
        "eventfd",
        EventFd::from_value_and_flags(3, EfdFlags::EFD_NONBLOCK),
    )?;
    event.write(4)?;
    ensure_eq!(event.read()?, 7, "the sum");
    ensure_eq!(event.read(), Err(Errno::EAGAIN), "nothing");
    event.write(u64::MAX - 1)?;
    ensure_eq!(event.write(1), Err(Errno::EAGAIN), "too much");
    let semaphore = EventFd::from_value_and_flags(2, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK)?;
    let taken = [semaphore.read(), semaphore.read(), semaphore.read()];
    ensure_eq!(taken, [Ok(1), Ok(1), Err(Errno::EAGAIN)], "a semaphore");
    // There and back between processes.
    let (ping, pong) = (EventFd::new()?, EventFd::new()?);
    let child = Child::start(|| {
        for round in 1..=200 {
            ensure_eq!(ping.read()?, round, "ping");
            pong.write(round)?;
        }
        Ok(())
    })?;
    for round in 1..=200 {
        ping.write(round)?;
        ensure_eq!(pong.read()?, round, "pong");
    }
    child.join()
}

fn epoll() -> Outcome {
    let epoll = available("epoll", Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC))?;
    let pipes: Vec<_> = (0..100).map(|_| std::io::pipe()).collect::<Result<_, _>>()?;
    for (number, (from, _)) in pipes.iter().enumerate() {
        epoll.add(from, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
    }
    let mut events = [EpollEvent::empty(); 128];
    ensure_eq!(epoll.wait(&mut events, EpollTimeout::ZERO)?, 0, "ready");
    for round in 1..20 {
        let written: Vec<usize> = (0..100).filter(|number| number % round == 0).collect();
        for &number in &written {
            (&pipes[number].1).write_all(b"x")?;
        }
        // Until they are read, again and again.
        for _ in 0..2 {
            let count = epoll.wait(&mut events, EpollTimeout::from(30_000u16))?;
            let mut ready: Vec<usize> = events[..count]
                .iter()
                .map(|event| usize::try_from(event.data()).unwrap_or(usize::MAX))
                .collect();
            ready.sort_unstable();
            ensure_eq!(ready, written, "ready");
        }
        for &number in &written {
            (&pipes[number].0).read_exact(&mut [0])?;
        }
    }
    epoll.delete(&pipes[0].0)?;
    (&pipes[0].1).write_all(b"x")?;
    ensure_eq!(
        epoll.wait(&mut events, EpollTimeout::ZERO)?,
        0,
        "ready after it was taken out"
    );
    Ok(())
}

fn epoll_edges() -> Outcome {
    let (inner, outer) = (
        Epoll::new(EpollCreateFlags::empty())?,
        Epoll::new(EpollCreateFlags::empty())?,
    );
    let (from, to) = std::io::pipe()?;
    inner.add(
        &from,
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1),
    )?;
    outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 2))?;
    let mut events = [EpollEvent::empty(); 4];
    let patience = EpollTimeout::from(30_000u16);
    for _ in 0..50 {
        (&to).write_all(b"xy")?;
        ensure_eq!(outer.wait(&mut events, patience)?, 1, "the outer one");
        ensure_eq!(inner.wait(&mut events, patience)?, 1, "the inner one");
        ensure_eq!(
            inner.wait(&mut events, EpollTimeout::ZERO)?,
            0,
            "the same edge again"
        );
        (&from).read_exact(&mut [0; 2])?;
    }
    let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
    inner.modify(&from, &mut EpollEvent::new(once, 3))?;
    (&to).write_all(b"z")?;
    ensure_eq!(inner.wait(&mut events, patience)?, 1, "once");
    ensure_eq!(inner.wait(&mut events, EpollTimeout::ZERO)?, 0, "not again");
    inner.modify(&from, &mut EpollEvent::new(once, 4))?;
    ensure_eq!(
        (inner.wait(&mut events, patience)?, events[0].data()),
        (1, 4),
        "armed again"
    );
    drop(to);
    (&from).read_exact(&mut [0])?;
    inner.modify(&from, &mut EpollEvent::new(EpollFlags::EPOLLIN, 5))?;
    inner.wait(&mut events, patience)?;
    ensure!(
        events[0].events().contains(EpollFlags::EPOLLHUP),
        "no hang-up: {:?}",
        events[0].events()
    );
    Ok(())
}

fn unix_stream() -> Outcome {
    let scratch = Scratch::new()?;
    let listener = UnixListener::bind(scratch.path("socket"))?;
    let mut children = Vec::new();
    for seed in 0..3 {
        let path = scratch.path("socket");
        children.push(Child::start(move || {
            let stream = UnixStream::connect(path)?;
            (&stream).write_all(&[u8::try_from(seed)?])?;
            send_stream(&stream, STREAM / 4, seed)?;
            stream.shutdown(std::net::Shutdown::Write)?;
            check_stream(&stream, 1000, seed + 100)
        })?);
    }
    for _ in 0..3 {
        let (stream, _) = listener.accept()?;
        let mut seed = [0];
        (&stream).read_exact(&mut seed)?;
        check_stream(&stream, STREAM / 4, seed[0].into())?;
        send_stream(&stream, 1000, u64::from(seed[0]) + 100)?;
    }
    children.into_iter().try_for_each(Child::join)
}

fn unix_datagrams() -> Outcome {
    let (first, second) = UnixDatagram::pair()?;
    for size in [0, 1, 100, 5000] {
        first.send(&vec![7; size])?;
        let mut bytes = vec![0; 8000];
        ensure_eq!(second.recv(&mut bytes)?, size, "bytes of a datagram");
    }
    first.send(&[9; 100])?;
    ensure_eq!(second.recv(&mut [0; 10])?, 10, "a part");
    first.send(b"next")?;
    ensure_eq!(second.recv(&mut [0; 10])?, 4, "the next");
    // In packets, in order, with an end.
    let (one, other) = socket::socketpair(
        socket::AddressFamily::Unix,
        socket::SockType::SeqPacket,
        None,
        socket::SockFlag::empty(),
    )?;
    let child = Child::start(|| {
        for size in 1..100usize {
            let mut bytes = [0; 200];
            ensure_eq!(read(&other, &mut bytes)?, size, "bytes of a packet");
        }
        Ok(())
    })?;
    for size in 1..100 {
        write(&one, &vec![1; size])?;
    }
    child.join()
}

/// A descriptor that was sent is open for who receives it.
fn descriptors_passed() -> Outcome {
    let (near, far) = UnixStream::pair()?;
    let child = Child::start(|| {
        for round in 0..30u8 {
            let mut byte = [0];
            let mut room = nix::cmsg_space!([RawFd; 2]);
            let mut parts = [IoSliceMut::new(&mut byte)];
            let message = socket::recvmsg::<()>(
                far.as_raw_fd(),
                &mut parts,
                Some(&mut room),
                MsgFlags::MSG_CMSG_CLOEXEC,
            )?;
            let mut files = Vec::new();
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(numbers) = control {
                    // SAFETY: the kernel has just made them for this process.
                    files.extend(
                        numbers
                            .iter()
                            .map(|&number| unsafe { OwnedFd::from_raw_fd(number) }),
                    );
                }
            }
            ensure_eq!(files.len(), 2, "descriptors");
            let mut word = [0];
            read(&files[0], &mut word)?;
            ensure_eq!(word[0], round, "what the pipe holds");
            write(&files[1], &[round + 1])?;
        }
        Ok(())
    })?;
    for round in 0..30u8 {
        let (there_out, there_in) = std::io::pipe()?;
        let (mut back_out, back_in) = std::io::pipe()?;
        (&there_in).write_all(&[round])?;
        let numbers = [there_out.as_raw_fd(), back_in.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&numbers)];
        socket::sendmsg::<()>(
            near.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &rights,
            MsgFlags::empty(),
            None,
        )?;
        drop((there_out, back_in));
        let mut word = [0];
        back_out.read_exact(&mut word)?;
        ensure_eq!(word[0], round + 1, "what came back");
        ensure_eq!(back_out.read(&mut word)?, 0, "nobody holds the other end");
    }
    child.join()
}

fn credentials() -> Outcome {
    let (near, far) = UnixStream::pair()?;
    let child = Child::start(|| Ok((&near).write_all(b"me")?))?;
    socket::setsockopt(&far, sockopt::PassCred, &true)?;
    let mut bytes = [0; 8];
    let mut room = nix::cmsg_space!(socket::UnixCredentials);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = socket::recvmsg::<()>(far.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::empty())?;
    let sender = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
        _ => None,
    });
    let peer = socket::getsockopt(&far, sockopt::PeerCredentials)?;
    ensure_eq!(peer.pid(), getpid().as_raw(), "who made the pair");
    let expected = child.pid.as_raw();
    child.join()?;
    // The sender is known if the option was set before it wrote.
    ensure!(
        sender == Some(expected) || sender == Some(0) || sender.is_none(),
        "the sender: {sender:?}"
    );
    Ok(())
}

fn system_v_messages() -> Outcome {
    let queue = available("msgget", syscall!(SYS_msgget, libc::IPC_PRIVATE, 0o600))?;
    let outcome = (|| -> Outcome {
        let child = Child::start(move || {
            for number in 0..100u64 {
                let message = [1 + number % 3, number];
                syscall!(SYS_msgsnd, queue, message.as_ptr(), 8, 0)?;
            }
            Ok(())
        })?;
        // By kind, each in its order.
        for kind in [2u64, 1, 3] {
            for number in (0..100u64).filter(|number| 1 + number % 3 == kind) {
                let mut message = [0u64; 2];
                ensure_eq!(
                    syscall!(SYS_msgrcv, queue, message.as_mut_ptr(), 8, kind, 0)?,
                    8,
                    "bytes"
                );
                ensure_eq!(message, [kind, number], "a message");
            }
        }
        child.join()
    })();
    syscall!(SYS_msgctl, queue, libc::IPC_RMID, 0usize)?;
    outcome
}

fn system_v_semaphores() -> Outcome {
    let set = available("semget", syscall!(SYS_semget, libc::IPC_PRIVATE, 2, 0o600))?;
    let change = move |number: u16, by: i16, flags: i16| {
        let operation = libc::sembuf {
            sem_num: number,
            sem_op: by,
            sem_flg: flags,
        };
        crate::sys::retry(|| syscall!(SYS_semop, set, &raw const operation, 1))
    };
    let nowait = i16::try_from(libc::IPC_NOWAIT)?;
    let undo = i16::try_from(libc::SEM_UNDO)?;
    let outcome = (|| -> Outcome {
        ensure_eq!(change(0, -1, nowait), Err(Errno::EAGAIN), "less than nothing");
        let child = Child::start(move || {
            for _ in 0..200 {
                change(0, -1, 0)?;
                change(1, 1, 0)?;
            }
            Ok(())
        })?;
        for _ in 0..200 {
            change(0, 1, 0)?;
            change(1, -1, 0)?;
        }
        child.join()?;
        // What a process has not given back is given back at its end.
        change(0, 5, 0)?;
        Child::start(move || {
            change(0, -5, undo)?;
            Ok(())
        })?
        .join()?;
        ensure_eq!(syscall!(SYS_semctl, set, 0, libc::GETVAL)?, 5, "the value");
        Ok(())
    })();
    syscall!(SYS_semctl, set, 0, libc::IPC_RMID)?;
    outcome
}

fn system_v_memory() -> Outcome {
    let segment = available("shmget", syscall!(SYS_shmget, libc::IPC_PRIVATE, 8 * PAGE, 0o600))?;
    let address = syscall!(SYS_shmat, segment, 0usize, 0)?;
    syscall!(SYS_shmctl, segment, libc::IPC_RMID, 0usize)?;
    // SAFETY: attached above for as long as this process lives, and aligned.
    let word = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(address + PAGE)) };
    let children: Vec<Child> = (0..4)
        .map(|_| {
            Child::start(|| {
                for _ in 0..1000 {
                    word.fetch_add(1, SeqCst);
                }
                Ok(())
            })
        })
        .collect::<Outcome<_>>()?;
    children.into_iter().try_for_each(Child::join)?;
    ensure_eq!(word.load(SeqCst), 4000, "the counter");
    syscall!(SYS_shmdt, address)?;
    Ok(())
}

/// The most urgent message first.
fn posix_queue() -> Outcome {
    let name = format!("/checks.{}", std::process::id());
    let attributes = mqueue::MqAttr::new(0, 8, 64, 0);
    let flags = mqueue::MQ_OFlag::O_RDWR | mqueue::MQ_OFlag::O_CREAT | mqueue::MQ_OFlag::O_EXCL;
    let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    let queue = available(
        "mq_open",
        mqueue::mq_open(name.as_str(), flags, mode, Some(&attributes)),
    )?;
    mqueue::mq_unlink(name.as_str())?;
    for priority in [3, 1, 5, 3] {
        mqueue::mq_send(&queue, &[u8::try_from(priority)?; 10], priority)?;
    }
    for expected in [5, 3, 3, 1] {
        let (mut bytes, mut priority) = ([0; 64], 0);
        let length = mqueue::mq_receive(&queue, &mut bytes, &mut priority)?;
        ensure_eq!(
            (length, priority, u32::from(bytes[0])),
            (10, expected, expected),
            "a message"
        );
    }
    let child = Child::start(|| {
        for number in 0..100u8 {
            mqueue::mq_send(&queue, &[number], 0)?;
        }
        Ok(())
    })?;
    for number in 0..100u8 {
        let (mut bytes, mut priority) = ([0; 64], 0);
        mqueue::mq_receive(&queue, &mut bytes, &mut priority)?;
        ensure_eq!(bytes[0], number, "in order");
    }
    child.join()
}
