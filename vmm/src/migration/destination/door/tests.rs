use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use shoal_cpuid::Table;
use shoal_proto::vm::MemoryBacking;
use shoal_proto::{Epoch, MigrationId, VmId};

use super::*;
use crate::migration::transport::Address;
use crate::migration::wire::{Attach, WireError};
use crate::ran_mark::RanMark;
use crate::spec::VmSpec;

const PLENTY: Duration = Duration::from_secs(60);

fn soon() -> Instant {
    Instant::now() + PLENTY
}

/// A door on loopback, and who is expected there.
fn door() -> (Door, Address, Prepared) {
    let spec = VmSpec {
        vm_id: VmId::new(),
        name: "t".into(),
        epoch: Epoch(2),
        cpus: 1,
        memory_bytes: 8 << 20,
        kernel: "".into(),
        initrd: None,
        cmdline: String::new(),
        memory_backing: MemoryBacking::Auto,
        cpu_baseline: Table::default(),
        console_offset: 0,
    };
    let prepared = Prepared {
        spec,
        migration_id: MigrationId::new(),
        token: "a secret".into(),
    };
    let incoming = Incoming {
        prepared: prepared.clone(),
        commit_timeout: PLENTY,
        accept_timeout: PLENTY,
        ran_mark: RanMark::at(None),
        identity: None,
    };
    let listener = Listener::bind(&Address::Tcp((Ipv4Addr::LOCALHOST, 0).into())).expect("a port");
    let address = listener.local_address().clone();
    (
        Door::open(listener, &incoming).expect("a thread"),
        address,
        prepared,
    )
}

fn silent(address: &Address, count: usize) -> Vec<TcpStream> {
    let address: SocketAddr = address.to_string().parse().expect("an address");
    let connect = |_| TcpStream::connect(address).expect("connected");
    (0..count).map(connect).collect()
}

/// A connection of the source that has sent its first frame.
fn connect(
    address: &Address,
    role: Role,
    first: impl FnOnce(&mut Connection<Transport>),
) -> Connection<Transport> {
    let transport = Transport::connect(address, None, PLENTY).expect("connected");
    transport.set_timeouts(Some(PLENTY)).expect("set");
    let mut connection = Connection::new(transport);
    connection.send_preamble(role).expect("sent");
    first(&mut connection);
    connection
}

fn source(address: &Address, prepared: &Prepared, resume: bool) -> Connection<Transport> {
    let hello = Hello {
        migration_id: prepared.migration_id.as_bytes().to_vec(),
        token: prepared.token.clone(),
        vm_id: prepared.spec.vm_id.as_bytes().to_vec(),
        epoch: prepared.spec.epoch.0,
        resume,
        ..Hello::default()
    };
    connect(address, Role::Control, |connection| {
        connection.send(FrameKind::Hello, &hello).expect("sent");
    })
}

fn attach(address: &Address, prepared: &Prepared, role: Role, index: u32) -> Connection<Transport> {
    let attach = Attach {
        migration_id: prepared.migration_id.as_bytes().to_vec(),
        token: prepared.token.clone(),
        index,
    };
    connect(address, role, |connection| {
        connection.send(FrameKind::Attach, &attach).expect("sent");
    })
}

fn refusal(mut connection: Connection<Transport>) -> String {
    let refused: Result<Empty, WireError> = connection.expect(FrameKind::AttachAck, "AttachAck");
    refused.expect_err("refused").to_string()
}

#[test]
fn whoever_says_nothing_is_in_nobodys_way() {
    let (door, address, prepared) = door();
    let before = silent(&address, 3 * MOST_UNPROVED);
    let _source = source(&address, &prepared, false);
    let (_control, _, hello) = door.first_control(soon()).expect("the source");
    assert_eq!(hello.epoch, 2);
    let meanwhile = silent(&address, MOST_UNPROVED);
    // In another order than they are asked for.
    let mut fault_pages = attach(&address, &prepared, Role::FaultPages, 0);
    let mut data = attach(&address, &prepared, Role::Data, 0);
    for (role, connection) in [(Role::Data, &mut data), (Role::FaultPages, &mut fault_pages)] {
        door.attached(role, 0, soon()).expect("attached");
        let _: Empty = connection
            .expect(FrameKind::AttachAck, "AttachAck")
            .expect("acknowledged");
    }
    let wrong = door.attached(Role::Data, 1, Instant::now());
    assert!(matches!(wrong, Err(AcceptError::NobodyCame)), "{wrong:?}");
    drop((before, meanwhile));
}

#[test]
fn the_oldest_that_has_proved_nothing_makes_room() {
    let (door, address, _) = door();
    let all = silent(&address, 3 * MOST_UNPROVED_OF_ONE);
    let known = |state: &mut State| (state.next == all.len() as u64).then_some(state.unproved.len());
    let unproved = loop {
        if let Ok(unproved) = door.shared.wait(Instant::now(), known) {
            break unproved;
        }
        std::thread::yield_now();
    };
    assert!(unproved <= MOST_UNPROVED_OF_ONE, "{unproved}");
    // They are told, by the end of their connections.
    for mut stream in all.iter().take(MOST_UNPROVED_OF_ONE) {
        stream.set_read_timeout(Some(PLENTY)).expect("set");
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    }
}

#[test]
fn who_may_come_depends_on_how_far_it_is() {
    let (door, address, prepared) = door();
    assert!(refusal(source(&address, &prepared, true)).contains("resume"));
    assert!(refusal(attach(&address, &prepared, Role::Data, 0)).contains("Control"));
    let stranger = Prepared {
        token: "a guess".into(),
        ..prepared.clone()
    };
    assert!(refusal(source(&address, &stranger, false)).contains("token"));
    assert!(matches!(
        door.first_control(Instant::now()),
        Err(AcceptError::NobodyCame)
    ));

    let _source = source(&address, &prepared, false);
    door.first_control(soon()).expect("the source");
    for resume in [false, true] {
        assert!(refusal(source(&address, &prepared, resume)).contains("resume"));
    }
    door.expect_again();
    assert!(refusal(source(&address, &prepared, false)).contains("resume"));
}

#[test]
fn a_source_that_begins_anew_is_not_kept_waiting_for_what_it_gave_up() {
    let (door, address, prepared) = door();
    door.expect_again();
    let _former = source(&address, &prepared, true);
    door.control_again(soon()).expect("the source");
    let _left_over = attach(&address, &prepared, Role::Data, 0);
    door.attached(Role::Data, 0, soon()).expect("attached");
    let _left_over = attach(&address, &prepared, Role::Data, 1);
    let _latter = source(&address, &prepared, true);
    let superseded = door.attached(Role::FaultPages, 0, soon());
    assert!(
        matches!(superseded, Err(AcceptError::NobodyCame)),
        "{superseded:?}"
    );
    door.control_again(soon()).expect("the source once more");
    let _data = attach(&address, &prepared, Role::Data, 0);
    door.attached(Role::Data, 0, soon())
        .expect("not what was left over");
}
