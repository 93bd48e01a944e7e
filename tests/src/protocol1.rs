//! A source that speaks migration protocol 1, kept as it was: it plays a recorded migration to a destination of today.
//!
//! Nothing here is shared with `shoal-vmm`, on purpose. What a recording holds and how it was made:
//! `tests/fixtures/migration-v1/README.md`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_MAX_CPUID_ENTRIES, kvm_clock_data, kvm_cpuid_entry2, kvm_regs};
use kvm_ioctls::Kvm;
use prost::Message;
use uuid::Uuid;
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::paths;

const PREAMBLE_LEN: usize = 16;
const HEADER_LEN: usize = 16;
const CRC: std::ops::Range<usize> = 12..16;
const PATIENCE: Duration = Duration::from_secs(30);

const HELLO: u8 = 1;
const HELLO_ACK: u8 = 2;
const PAGES: u8 = 3;
const PASS_END: u8 = 4;
const PASS_ACK: u8 = 5;
const STATE: u8 = 6;
const READY: u8 = 7;
const COMMIT: u8 = 8;
const RUNNING: u8 = 9;
const ABORT: u8 = 10;

const STATE_HEADER_LEN: usize = 16;
const SECTION_HEADER_LEN: usize = 12;
const SECTION_VCPU: u16 = 1;
const PAGE: usize = 4096;
const MSR_TSC: u32 = 0x10;
const RFLAGS_IOPL: u64 = 3 << 12;
/// What a guest has noted of its TSC is from a while ago or for a while ahead; less than 10 s at any frequency there is.
const TSC_NOTED_WITHIN: u64 = 10_000_000_000;

/// The first message of a source of protocol 1.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub migration_id: Vec<u8>,
    /// The secret.
    #[prost(string, tag = "2")]
    pub token: String,
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub vm_id: Vec<u8>,
    /// To run at.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// Guest RAM in bytes.
    #[prost(uint64, tag = "5")]
    pub memory_bytes: u64,
    /// vCPUs.
    #[prost(uint32, tag = "6")]
    pub cpus: u32,
    /// The guest's.
    #[prost(uint32, tag = "7")]
    pub tsc_khz: u32,
    /// `struct kvm_cpuid_entry2`, one after another.
    #[prost(bytes = "vec", tag = "8")]
    pub cpuid: Vec<u8>,
    /// Whose values are in the state.
    #[prost(uint32, repeated, tag = "9")]
    pub msr_indices: Vec<u32>,
    /// In the state.
    #[prost(string, repeated, tag = "10")]
    pub devices: Vec<String>,
    /// The source's KVM emulated ring 0.
    #[prost(bool, tag = "11")]
    pub software_kvm: bool,
}

/// By the self-test of the VMM under test. The probe runs on both kinds.
fn is_software_kvm() -> bool {
    let tested = Command::new(paths::program("shoal-vmm"))
        .arg("--self-test")
        .output();
    let line = tested.expect("shoal-vmm starts").stdout;
    let answer: serde_json::Value = serde_json::from_slice(&line).expect("a line of JSON");
    answer["kvm"] == "software"
}

impl Hello {
    /// The migration, as the API writes it.
    #[must_use]
    pub fn migration(&self) -> String {
        Uuid::from_slice(&self.migration_id)
            .expect("16 bytes")
            .to_string()
    }

    /// The VM, as the API writes it.
    #[must_use]
    pub fn vm(&self) -> String {
        Uuid::from_slice(&self.vm_id).expect("16 bytes").to_string()
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct Abort {
    #[prost(string, tag = "1")]
    reason: String,
}

/// Of the vCPU's section only what is looked at; [`with_vcpu`] leaves the rest as it is.
#[derive(Clone, PartialEq, prost::Message)]
struct MsrEntry {
    #[prost(uint32, tag = "1")]
    index: u32,
    #[prost(fixed64, tag = "2")]
    data: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct VcpuSection {
    #[prost(bytes = "vec", repeated, tag = "1")]
    regs: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    sregs: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    xsave: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "4")]
    xcrs: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "5")]
    lapic: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    debug_regs: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "7")]
    events: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    mp_state: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "9")]
    msrs: Vec<MsrEntry>,
}

#[derive(Debug, Clone)]
struct Frame {
    kind: u8,
    payload: Vec<u8>,
}

/// A recorded migration.
#[derive(Debug, Clone)]
pub struct Recorded {
    preamble: Vec<u8>,
    frames: Vec<Frame>,
}

/// Where the recording is kept.
#[must_use]
pub fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/migration-v1/stream.zst")
}

impl Recorded {
    /// The recording in the repository.
    #[must_use]
    pub fn load() -> Self {
        let compressed = std::fs::read(fixture()).expect("the recording");
        Self::parse(&zstd::decode_all(compressed.as_slice()).expect("zstd"))
    }

    /// Takes a stream apart and checks it.
    #[must_use]
    pub fn parse(stream: &[u8]) -> Self {
        let (preamble, mut rest) = stream.split_at(PREAMBLE_LEN);
        assert_eq!(&preamble[..10], b"SHOALMIG\x01\x00", "a stream of protocol 1");
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let (header, after) = rest.split_at(HEADER_LEN);
            let length = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes"));
            let (payload, after) = after.split_at(usize::try_from(length).expect("64 bits"));
            let number = u32::try_from(frames.len()).expect("few");
            let whole = encode(header[0], number, payload);
            assert!(whole.starts_with(header), "frame {number} is damaged");
            frames.push(Frame {
                kind: header[0],
                payload: payload.to_vec(),
            });
            rest = after;
        }
        assert_eq!(frames.first().map(|frame| frame.kind), Some(HELLO));
        assert_eq!(frames.last().map(|frame| frame.kind), Some(COMMIT));
        Self {
            preamble: preamble.to_vec(),
            frames,
        }
    }

    /// What it was about.
    #[must_use]
    pub fn hello(&self) -> Hello {
        Hello::decode(self.frames[0].payload.as_slice()).expect("a Hello")
    }

    /// Makes the recording fit this host: a source on another CPU would have been refused before its first page.
    pub fn fit_to_this_host(&mut self) {
        let kvm = Kvm::new().expect("/dev/kvm");
        let mut hello = self.hello();
        hello.cpuid = common_cpuid(&hello.cpuid, &kvm);
        hello.software_kvm = is_software_kvm();
        let vm = kvm.create_vm().expect("a VM");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        hello.tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        let known = kvm.get_msr_index_list().expect("MSRs").as_slice().to_vec();
        if !hello.msr_indices.iter().all(|index| known.contains(index)) {
            hello.msr_indices.retain(|index| known.contains(index));
            self.edit_vcpu(|vcpu| vcpu.msrs.retain(|msr| known.contains(&msr.index)));
        }
        self.frames[0].payload = hello.encode_to_vec();
        self.edit_vcpu(|vcpu| vcpu.regs.iter_mut().for_each(|regs| allow_ports(regs)));
        // Setting it is what makes KVM look whether the TSC can be told.
        vm.set_clock(&kvm_clock_data::default()).expect("a clock");
        let clock = vm.get_clock().expect("a clock");
        assert_ne!(clock.flags & KVM_CLOCK_HOST_TSC, 0, "KVM tells the host's TSC");
        self.move_to_tsc(clock.host_tsc);
    }

    /// Makes everything that the guest has noted of its TSC the same time before, or after, `tsc` as it was of the TSC when
    /// it was recorded. KVM without hardware virtualization gives guests the host's own TSC, and a guest from a host that
    /// had been up for longer would wait for as long.
    fn move_to_tsc(&mut self, tsc: u64) {
        let mut recorded = 0;
        self.edit_vcpu(|vcpu| {
            recorded = vcpu
                .msrs
                .iter()
                .find(|msr| msr.index == MSR_TSC)
                .map_or(0, |msr| msr.data);
        });
        assert_ne!(recorded, 0, "the recording has a TSC");
        let moved = |word: u64| {
            let near = word.abs_diff(recorded) < TSC_NOTED_WITHIN;
            near.then(|| word.wrapping_sub(recorded).wrapping_add(tsc))
        };
        let move_words = |bytes: &mut [u8]| {
            for word in bytes.chunks_exact_mut(8) {
                if let Some(moved) = moved(u64::from_le_bytes((&*word).try_into().expect("8 bytes"))) {
                    word.copy_from_slice(&moved.to_le_bytes());
                }
            }
        };
        self.edit_vcpu(|vcpu| {
            for msr in vcpu.msrs.iter_mut().filter(|msr| msr.index == MSR_TSC) {
                msr.data = tsc;
            }
            for bytes in &mut vcpu.regs {
                move_words(bytes);
                // Stopped right after RDTSC, whose answer is in EDX:EAX.
                let mut regs = kvm_regs::read_from_bytes(bytes).expect("registers");
                if let Some(moved) = moved(regs.rdx << 32 | regs.rax) {
                    (regs.rax, regs.rdx) = (moved & u64::from(u32::MAX), moved >> 32);
                    bytes.copy_from_slice(regs.as_bytes());
                }
            }
        });
        for frame in self.frames.iter_mut().filter(|frame| frame.kind == PAGES) {
            // Pages are the last of the frame, so that many bytes from its end on they begin.
            let pages = frame.payload.len() / PAGE * PAGE;
            let start = frame.payload.len() - pages;
            move_words(&mut frame.payload[start..]);
        }
    }

    fn edit_vcpu(&mut self, mut edit: impl FnMut(&mut VcpuSection)) {
        for frame in self.frames.iter_mut().filter(|frame| frame.kind == STATE) {
            frame.payload = with_vcpu(&frame.payload, &mut edit);
        }
    }

    /// Plays it to a destination and answers what a source must hear.
    ///
    /// # Errors
    /// In words, what came instead.
    pub fn play(&self, to: SocketAddr) -> Result<(), String> {
        let mut stream = TcpStream::connect(to).map_err(|error| error.to_string())?;
        let tune = stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            .and_then(|()| stream.set_nodelay(true));
        tune.map_err(|error| error.to_string())?;
        let mut heard = 0;
        let mut expect = |stream: &mut TcpStream, kind: u8, about: &[u8]| {
            let answer = receive(stream, heard)?;
            heard += 1;
            match answer {
                Frame { kind: found, payload } if found == kind && payload == about => Ok(()),
                Frame { kind: ABORT, payload } => Err(format!("refused: {:?}", Abort::decode(&*payload))),
                other => Err(format!("expected kind {kind} with {about:?}, got {other:?}")),
            }
        };
        stream
            .write_all(&self.preamble)
            .map_err(|error| error.to_string())?;
        for (number, frame) in (0..).zip(&self.frames) {
            let sent = stream.write_all(&encode(frame.kind, number, &frame.payload));
            // Where an answer is due, what the destination said is worth more than that it closed.
            let sent = sent.map_err(|error| format!("frame {number}: {error}"));
            match frame.kind {
                HELLO => expect(&mut stream, HELLO_ACK, &[8, 1])?,
                PASS_END => expect(&mut stream, PASS_ACK, &frame.payload)?,
                STATE => expect(&mut stream, READY, &self.step())?,
                COMMIT => expect(&mut stream, RUNNING, &self.step())?,
                _ => sent?,
            }
        }
        Ok(())
    }

    /// The payload of Ready, Commit and Running.
    fn step(&self) -> Vec<u8> {
        self.frames.last().expect("Commit").payload.clone()
    }
}

fn encode(kind: u8, number: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_LEN];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(
        &u32::try_from(payload.len())
            .expect("within the limit")
            .to_le_bytes(),
    );
    bytes[8..12].copy_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(payload);
    let crc = crc32c::crc32c(&bytes);
    bytes[CRC].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn receive(stream: &mut TcpStream, number: u32) -> Result<Frame, String> {
    let mut header = [0; HEADER_LEN];
    stream
        .read_exact(&mut header)
        .map_err(|error| error.to_string())?;
    let length = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes"));
    let length = usize::try_from(length).ok().filter(|&length| length <= 4096);
    let mut payload = vec![0; length.ok_or("an answer that is too long")?];
    stream
        .read_exact(&mut payload)
        .map_err(|error| error.to_string())?;
    if encode(header[0], number, &payload).starts_with(&header) {
        Ok(Frame {
            kind: header[0],
            payload,
        })
    } else {
        Err(format!("answer {number} is damaged: {header:?}"))
    }
}

/// The recorded table with only what this host has as well. The vendor and the widths are this host's.
fn common_cpuid(recorded: &[u8], kvm: &Kvm) -> Vec<u8> {
    let host = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .expect("KVM's CPUID");
    // What the VMM adds to KVM's answer: TSC deadline timer, hypervisor present.
    const ADDED_TO_LEAF_1_ECX: u32 = 1 << 24 | 1 << 31;
    let mut bytes = Vec::new();
    for entry in recorded.chunks_exact(size_of::<kvm_cpuid_entry2>()) {
        let mut entry = kvm_cpuid_entry2::read_from_bytes(entry).expect("an entry");
        let same = |other: &&kvm_cpuid_entry2| (other.function, other.index) == (entry.function, entry.index);
        let host = host.as_slice().iter().find(same).copied().unwrap_or_default();
        match (entry.function, entry.index) {
            (0, _) => (entry.ebx, entry.ecx, entry.edx) = (host.ebx, host.ecx, host.edx),
            (1, _) => {
                entry.ecx &= host.ecx | ADDED_TO_LEAF_1_ECX;
                entry.edx &= host.edx;
            }
            (7, 0..=2) | (0xd, 0 | 1) => {
                // Leaf 7.0 EAX is the last subleaf, and smaller on either side.
                entry.eax = if (entry.function, entry.index) == (7, 0) {
                    entry.eax.min(host.eax)
                } else {
                    entry.eax & host.eax
                };
                if entry.function == 7 {
                    entry.ebx &= host.ebx;
                    entry.ecx &= host.ecx;
                    entry.edx &= host.edx;
                } else if entry.index == 0 {
                    // Bytes of an XSAVE area.
                    entry.ebx = entry.ebx.min(host.ebx);
                    entry.ecx = entry.ecx.min(host.ecx);
                }
            }
            (0x8000_0008, _) => (entry.eax, entry.ebx) = (host.eax, entry.ebx & host.ebx),
            (0x4000_0001, _) => entry.eax &= host.eax,
            (0x8000_0001 | 0x8000_0007, _) => {
                entry.ecx &= host.ecx;
                entry.edx &= host.edx;
            }
            _ => {}
        }
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes
}

/// Gives I/O privilege to ring 3. The probe of then had only its task state's bitmap, which QEMU, where it emulates AMD-V, does not heed
/// after a move.
fn allow_ports(regs: &mut [u8]) {
    let mut edited = kvm_regs::read_from_bytes(regs).expect("registers");
    edited.rflags |= RFLAGS_IOPL;
    regs.copy_from_slice(edited.as_bytes());
}

/// The state with its vCPU as `edit` leaves it.
fn with_vcpu(state: &[u8], edit: &mut impl FnMut(&mut VcpuSection)) -> Vec<u8> {
    let (header, mut rest) = state.split_at(STATE_HEADER_LEN);
    let mut edited = header.to_vec();
    while !rest.is_empty() {
        let (section, after) = rest.split_at(SECTION_HEADER_LEN);
        let length = u32::from_le_bytes(section[8..12].try_into().expect("4 bytes"));
        let (payload, after) = after.split_at(usize::try_from(length).expect("64 bits"));
        let payload = if section[..2] == SECTION_VCPU.to_le_bytes() {
            let mut vcpu = VcpuSection::decode(payload).expect("a vCPU");
            edit(&mut vcpu);
            vcpu.encode_to_vec()
        } else {
            payload.to_vec()
        };
        edited.extend_from_slice(&section[..8]);
        edited.extend_from_slice(&u32::try_from(payload.len()).expect("small").to_le_bytes());
        edited.extend_from_slice(&payload);
        rest = after;
    }
    edited
}
