//! Faults of every kind: which signal comes, with what address, error code and trap number, and that the program goes on.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

use nix::libc::{self, c_int, c_void, siginfo_t};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::signal::{SaFlags, Signal};
use nix::sys::wait::WaitStatus;

use crate::check::{Check, Outcome, check};
use crate::sys::{Child, Mapping, PAGE, Scratch, handle, rw};
use crate::{ensure, ensure_eq};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("faults.page", page),
    check("faults.instruction-fetch", instruction_fetch),
    check("faults.beyond-a-file", beyond_a_file),
    check("faults.not-canonical", not_canonical),
    check("faults.wild-jumps", wild_jumps),
    check("faults.bad-instructions", bad_instructions),
    check("faults.breakpoint", breakpoint),
    check("faults.division", division),
    check("faults.floating-point", floating_point),
    check("faults.alignment", alignment),
    check("faults.trap-flag", trap_flag),
    check("faults.many", many),
    check("faults.deadly", deadly),
    check("faults.stack-overflow", stack_overflow),
];

/// Page fault, of pages that are there; by a write; by a program; by a fetch of an instruction.
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const FETCH: u64 = 16;

/// Where the code that faults begins, and where to go on.
static AT: AtomicU64 = AtomicU64::new(0);
static AFTER: AtomicU64 = AtomicU64::new(0);
/// The latest fault.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static TRAP: AtomicU64 = AtomicU64::new(0);
static ERROR: AtomicU64 = AtomicU64::new(0);
static RIP: AtomicU64 = AtomicU64::new(0);
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Runs instructions, and goes on behind them if they fault.
macro_rules! attempt {
    ($code:literal $(, $($operands:tt)*)?) => {{
        // SAFETY: the handler goes on behind the instructions, which change nothing but what their operands say and the
        // flags, before they fault.
        unsafe {
            std::arch::asm!(
                "lea {scratch}, [rip + 2f]", "mov [{at}], {scratch}",
                "lea {scratch}, [rip + 3f]", "mov [{after}], {scratch}",
                "2:", $code, "3:",
                scratch = out(reg) _, at = in(reg) AT.as_ptr(), after = in(reg) AFTER.as_ptr(), $($($operands)*)?
            );
        }
        Fault::latest()
    }};
}

/// A fault as the handler was told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fault {
    signal: c_int,
    code: c_int,
    address: u64,
    trap: u64,
    error: u64,
    rip: u64,
}

impl Fault {
    /// Takes the latest; all zeros if there was none.
    fn latest() -> Self {
        Self {
            signal: SIGNAL.swap(0, SeqCst),
            code: CODE.swap(0, SeqCst),
            address: ADDRESS.swap(0, SeqCst),
            trap: TRAP.swap(0, SeqCst),
            error: ERROR.swap(0, SeqCst),
            rip: RIP.swap(0, SeqCst),
        }
    }
}

extern "C" fn note(signal: c_int, info: *mut siginfo_t, given: *mut c_void) {
    // SAFETY: this is the handler.
    let (info, context) = unsafe { (&*info, crate::sys::context(given)) };
    let registers = &mut context.uc_mcontext.gregs;
    let register = |index: c_int| registers[index.unsigned_abs() as usize].cast_unsigned();
    SIGNAL.store(signal, SeqCst);
    CODE.store(info.si_code, SeqCst);
    // SAFETY: signals of faults have one.
    ADDRESS.store(unsafe { info.si_addr() }.expose_provenance() as u64, SeqCst);
    TRAP.store(register(libc::REG_TRAPNO), SeqCst);
    ERROR.store(register(libc::REG_ERR), SeqCst);
    RIP.store(register(libc::REG_RIP), SeqCst);
    COUNT.fetch_add(1, SeqCst);
    registers[libc::REG_RIP.unsigned_abs() as usize] = AFTER.load(SeqCst).cast_signed();
}

fn catch() -> Outcome {
    for signal in [
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGILL,
        Signal::SIGFPE,
        Signal::SIGTRAP,
    ] {
        handle(signal, SaFlags::SA_NODEFER, note)?;
    }
    Ok(())
}

fn at() -> u64 {
    AT.load(SeqCst)
}

/// What a page fault of the instruction at [`AT`] looks like.
fn page_fault(code: c_int, address: u64, error: u64) -> Fault {
    Fault {
        signal: libc::SIGSEGV,
        code,
        address,
        trap: 14,
        error,
        rip: at(),
    }
}

fn read(address: u64) -> Fault {
    attempt!("mov {value}, [{address}]", address = in(reg) address, value = out(reg) _)
}

fn write(address: u64) -> Fault {
    attempt!("mov byte ptr [{address}], 1", address = in(reg) address)
}

fn page() -> Outcome {
    catch()?;
    let pages = Mapping::new(4 * PAGE, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE)?;
    let base = pages.address() as u64;
    ensure_eq!(pages.get(0), 0, "a fresh page");
    let seen = write(base + 5);
    ensure_eq!(
        seen,
        page_fault(SEGV_ACCERR, base + 5, USER | WRITE | PRESENT),
        "a write to a page to read"
    );
    pages.protect(PAGE, PAGE, ProtFlags::PROT_NONE)?;
    let closed = base + PAGE as u64 + 9;
    let seen = read(closed);
    ensure!(
        (seen.signal, seen.code, seen.address, seen.error & (USER | WRITE))
            == (libc::SIGSEGV, SEGV_ACCERR, closed, USER),
        "a read of a closed page: {seen:?}"
    );
    pages.punch(2 * PAGE, PAGE)?;
    let gone = base + 2 * PAGE as u64 + 16;
    let seen = write(gone);
    ensure_eq!(
        seen,
        page_fault(SEGV_MAPERR, gone, USER | WRITE),
        "a write to nothing"
    );
    let seen = read(8);
    ensure_eq!(seen, page_fault(SEGV_MAPERR, 8, USER), "a read near 0");
    // Across the end of what is there: the address is the first that is not.
    let end = base + 2 * PAGE as u64;
    pages.protect(PAGE, PAGE, rw())?;
    let seen = read(end - 4);
    ensure_eq!(seen, page_fault(SEGV_MAPERR, end, USER), "a read across the end");
    pages.protect(0, PAGE, rw())?;
    ensure_eq!(write(base + 5).signal, 0, "a write to a page to write");
    Ok(())
}

fn instruction_fetch() -> Outcome {
    catch()?;
    let page = Mapping::private(PAGE)?;
    page.put(0, &[0xc3]); // ret
    let to = page.address() as u64;
    let jump = || -> Fault { attempt!("jmp {to}", to = in(reg) to) };
    let seen = jump();
    ensure!(
        (seen.signal, seen.code, seen.address, seen.rip) == (libc::SIGSEGV, SEGV_ACCERR, to, to)
            && seen.error & (FETCH | USER | PRESENT) == FETCH | USER | PRESENT,
        "a jump to data: {seen:?}"
    );
    page.protect(0, PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_EXEC)?;
    // SAFETY: the page holds a function that does nothing, and may be executed.
    let function: extern "C" fn() = unsafe { std::mem::transmute(page.pointer::<u8>(0)) };
    function();
    ensure_eq!(Fault::latest().signal, 0, "a call of code");
    Ok(())
}

fn beyond_a_file() -> Outcome {
    catch()?;
    let scratch = Scratch::new()?;
    let file = std::fs::File::create_new(scratch.path("short"))?;
    file.set_len(PAGE as u64 + 100)?;
    drop(file);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(scratch.path("short"))?;
    let pages = Mapping::of_file(&file, 3 * PAGE, rw(), MapFlags::MAP_SHARED)?;
    pages.set(PAGE + 200, 1);
    let beyond = (pages.address() + 2 * PAGE) as u64 + 24;
    let seen = write(beyond);
    ensure!(
        (seen.signal, seen.code, seen.address, seen.trap) == (libc::SIGBUS, BUS_ADRERR, beyond, 14),
        "a write beyond the end of a file: {seen:?}"
    );
    file.set_len(10)?;
    let cut = (pages.address() + PAGE) as u64;
    let seen = read(cut);
    ensure!(
        (seen.signal, seen.code, seen.address) == (libc::SIGBUS, BUS_ADRERR, cut),
        "a read of what was cut off: {seen:?}"
    );
    Ok(())
}

/// Execution that ends up in the kernel's half of the address space, by a jump or by the return from a signal.
fn wild_jumps() -> Outcome {
    catch()?;
    for address in [u64::MAX, 0xffff_ffff_ffff_f000] {
        let seen = attempt!("jmp {address}", address = in(reg) address);
        ensure!(
            (seen.signal, seen.trap, seen.rip) == (libc::SIGSEGV, 14, address),
            "{address:#x}: {seen:?}"
        );
    }
    handle(Signal::SIGUSR1, SaFlags::empty(), derail)?;
    for address in [1 << 63, u64::MAX] {
        ASTRAY.store(address, SeqCst);
        let seen = attempt!(
            "syscall",
            inout("rax") libc::SYS_kill => _, in("rdi") std::process::id(), in("rsi") libc::SIGUSR1,
            out("rcx") _, out("r11") _
        );
        ensure!(seen.signal == libc::SIGSEGV, "back to {address:#x}: {seen:?}");
    }
    Ok(())
}

/// Where the handler of SIGUSR1 has the program go on.
static ASTRAY: AtomicU64 = AtomicU64::new(0);

extern "C" fn derail(_: c_int, _: *mut siginfo_t, given: *mut c_void) {
    // SAFETY: this is the handler.
    let context = unsafe { crate::sys::context(given) };
    context.uc_mcontext.gregs[libc::REG_RIP.unsigned_abs() as usize] = ASTRAY.load(SeqCst).cast_signed();
}

fn not_canonical() -> Outcome {
    catch()?;
    for address in [
        0x8000_0000_0000_0000,
        0x0000_8000_0000_0000,
        0x7fff_ffff_ffff_fff0,
    ] {
        for attempt in [read, write] {
            let seen = attempt(address);
            ensure!(
                (seen.signal, seen.code, seen.trap, seen.rip) == (libc::SIGSEGV, libc::SI_KERNEL, 13, at()),
                "{address:#x}: {seen:?}"
            );
        }
    }
    // Through RBP it is the stack's fault.
    // SAFETY: the handler goes on where RBP gets back its value.
    unsafe {
        std::arch::asm!(
            "lea {scratch}, [rip + 2f]", "mov [{at}], {scratch}", "lea {scratch}, [rip + 3f]", "mov [{after}], {scratch}",
            "xchg rbp, {bad}", "2: mov {scratch}, [rbp]", "3: xchg rbp, {bad}",
            scratch = out(reg) _, at = in(reg) AT.as_ptr(), after = in(reg) AFTER.as_ptr(), bad = inout(reg) 1u64 << 63 => _
        );
    }
    let seen = Fault::latest();
    ensure!(
        (seen.signal, seen.trap, seen.rip) == (libc::SIGBUS, 12, at()),
        "through RBP: {seen:?}"
    );
    Ok(())
}

fn bad_instructions() -> Outcome {
    catch()?;
    let seen = attempt!("ud2");
    ensure!(
        (seen.signal, seen.code, seen.trap, seen.rip, seen.address)
            == (libc::SIGILL, ILL_ILLOPN, 6, at(), at()),
        "ud2: {seen:?}"
    );
    let privileged = [
        ("hlt", attempt!("hlt")),
        ("cli", attempt!("cli")),
        ("invlpg", attempt!("invlpg [rsp]")),
        (
            "rdmsr",
            attempt!("rdmsr", out("eax") _, out("edx") _, in("ecx") 0x10),
        ),
        (
            "wrmsr",
            attempt!("wrmsr", in("eax") 0, in("edx") 0, in("ecx") 0x10),
        ),
        ("mov from cr0", attempt!("mov {cr0}, cr0", cr0 = out(reg) _)),
        ("mov to cr3", attempt!("mov cr3, {cr3}", cr3 = in(reg) 0u64)),
        ("lgdt", attempt!("lgdt [rsp]")),
        ("mov from dr7", attempt!("mov {dr7}, dr7", dr7 = out(reg) _)),
        ("swapgs", attempt!("swapgs")),
        (
            "xsetbv",
            attempt!("xsetbv", in("eax") 0, in("edx") 0, in("ecx") 7),
        ),
    ];
    for (name, seen) in privileged {
        ensure!(
            seen.signal == libc::SIGSEGV && seen.trap == 13 && seen.error == 0
                || (name == "swapgs" && seen.signal == libc::SIGILL),
            "{name}: {seen:?}"
        );
    }
    // KVM without hardware virtualization says that there is no such instruction.
    let seen = attempt!("int 0x81");
    ensure!(
        [(libc::SIGSEGV, 13, 0x81 * 8 + 2), (libc::SIGILL, 6, 0)].contains(&(
            seen.signal,
            seen.trap,
            seen.error
        )) && seen.rip == at(),
        "int 0x81: {seen:?}"
    );
    // Beyond the end of both tables.
    for bad in [0x1233u64, 0x1237] {
        let seen = attempt!("mov ds, {bad:e}", bad = in(reg) bad);
        ensure!(
            seen.signal == libc::SIGSEGV && seen.rip == at(),
            "selector {bad:#x}: {seen:?}"
        );
    }
    Ok(())
}

fn breakpoint() -> Outcome {
    catch()?;
    let seen = attempt!("int3");
    ensure!(
        (seen.signal, seen.code, seen.trap, seen.rip) == (libc::SIGTRAP, libc::SI_KERNEL, 3, at() + 1),
        "int3: {seen:?}"
    );
    let seen = attempt!(".byte 0xcd, 0x03");
    ensure!(
        (seen.signal, seen.trap, seen.rip) == (libc::SIGTRAP, 3, at() + 2),
        "int 3 of two bytes: {seen:?}"
    );
    Ok(())
}

fn division() -> Outcome {
    catch()?;
    let divide = |by: u64, high: u64| -> Fault {
        attempt!("div {by}", by = in(reg) by, inout("rax") 7u64 => _, inout("rdx") high => _)
    };
    for (by, high) in [(0, 0), (1, 1)] {
        let seen = divide(by, high);
        ensure!(
            (seen.signal, seen.code, seen.trap, seen.address) == (libc::SIGFPE, FPE_INTDIV, 0, at()),
            "{high}:7 / {by}: {seen:?}"
        );
    }
    ensure_eq!(divide(7, 0).signal, 0, "7 / 7");
    Ok(())
}

fn floating_point() -> Outcome {
    catch()?;
    let (all, unmasked) = (0x1f80u32, 0x1d80u32);
    let seen = attempt!(
        "divsd xmm0, xmm1",
        inout("xmm0") 1.0f64 => _, in("xmm1") 0.0f64,
    );
    ensure_eq!(seen.signal, 0, "1/0, masked");
    // SAFETY: the handler returns with the control register as it was, which is put back below.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const unmasked) };
    let seen = attempt!("divsd xmm0, xmm1", inout("xmm0") 1.0f64 => _, in("xmm1") 0.0f64);
    // SAFETY: as the C library has it.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const all) };
    ensure!(
        (seen.signal, seen.code, seen.trap, seen.address) == (libc::SIGFPE, FPE_FLTDIV, 19, at()),
        "1/0 by SSE: {seen:?}"
    );
    let control = 0x037bu16;
    let seen = attempt!(
        "fninit; fldcw [{control}]; fld1; fldz; fdivp; 4: fwait",
        control = in(reg) &raw const control, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
        out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _
    );
    // SAFETY: back to how it starts.
    unsafe { std::arch::asm!("fninit", out("st(0)") _) };
    ensure!(
        (seen.signal, seen.code, seen.trap) == (libc::SIGFPE, FPE_FLTDIV, 16),
        "1/0 by x87: {seen:?}"
    );
    Ok(())
}

/// With AC set a program wants to be told of what is not aligned; the kernel, which never heeds it, must not stumble itself.
fn alignment() -> Outcome {
    catch()?;
    let word = [0u64; 3];
    let odd = word.as_ptr().cast::<u8>().wrapping_add(1);
    let seen = attempt!(
        "pushfq; or dword ptr [rsp], 0x40000; popfq; mov {value}, [{odd}]; pushfq; and dword ptr [rsp], ~0x40000; popfq",
        odd = in(reg) odd, value = out(reg) _
    );
    // The handler leaves it set.
    clear_ac();
    ensure!(
        seen.signal == 0 || (seen.signal, seen.code, seen.trap) == (libc::SIGBUS, BUS_ADRALN, 17),
        "a word at an odd address: {seen:?}"
    );
    // Page faults and system calls amid it.
    let fresh = Mapping::private(64 * PAGE)?;
    for page in 0..64 {
        let address = fresh.address() + page * PAGE;
        // SAFETY: the word is within the mapping and aligned; getpid changes only what is named.
        unsafe {
            std::arch::asm!(
                "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov qword ptr [{address}], 1", "mov eax, 39", "syscall",
                "pushfq", "and dword ptr [rsp], ~0x40000", "popfq",
                address = in(reg) address, out("rax") _, out("rcx") _, out("r11") _
            );
        }
    }
    ensure_eq!(Fault::latest().signal, 0, "aligned words");
    Ok(())
}

fn clear_ac() {
    // SAFETY: the stack below this function's frame is used and left as it was.
    unsafe { std::arch::asm!("pushfq", "and dword ptr [rsp], ~0x40000", "popfq") }
}

/// A program that steps itself.
fn trap_flag() -> Outcome {
    static STEPS: AtomicU64 = AtomicU64::new(0);
    static WRONG: AtomicU64 = AtomicU64::new(0);
    extern "C" fn stepped(_: c_int, info: *mut siginfo_t, given: *mut c_void) {
        // SAFETY: this is the handler.
        let (info, context) = unsafe { (&*info, crate::sys::context(given)) };
        let trap = context.uc_mcontext.gregs[libc::REG_TRAPNO.unsigned_abs() as usize];
        STEPS.fetch_add(1, SeqCst);
        if info.si_code != TRAP_TRACE || trap != 1 {
            WRONG.fetch_add(1, SeqCst);
        }
    }
    handle(Signal::SIGTRAP, SaFlags::empty(), stepped)?;
    let fresh = Mapping::private(PAGE)?;
    for _ in 0..20 {
        // SAFETY: sets and clears the flag; what is done in between is told, and the page is mapped.
        unsafe {
            std::arch::asm!(
                "pushfq", "or dword ptr [rsp], 0x100", "popfq",
                "nop", "mov qword ptr [{page}], 1", "mov eax, 39", "syscall", "nop",
                "pushfq", "and dword ptr [rsp], ~0x100", "popfq",
                page = in(reg) fresh.address(), out("rax") _, out("rcx") _, out("r11") _
            );
        }
        let steps = STEPS.swap(0, SeqCst);
        // After each of eight instructions; POPFQ may end it before or after its own trap, and the one after SYSCALL may
        // be counted to it.
        ensure!((7..=9).contains(&steps), "{steps} steps");
        ensure_eq!(WRONG.load(SeqCst), 0, "steps that are none");
    }
    Ok(())
}

fn many() -> Outcome {
    catch()?;
    COUNT.store(0, SeqCst);
    let page = Mapping::new(PAGE, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE)?;
    let address = page.address() as u64;
    for round in 0..500u64 {
        let offset = round * 8 % PAGE as u64;
        ensure_eq!(write(address + offset).address, address + offset, "round {round}");
        ensure_eq!(attempt!("ud2").trap, 6, "round {round}");
        ensure_eq!(attempt!("int3").trap, 3, "round {round}");
        ensure_eq!(read(1 << 63).trap, 13, "round {round}");
    }
    ensure_eq!(COUNT.load(SeqCst), 2000, "signals");
    Ok(())
}

/// Without a handler the process ends by the signal, also where returning to it cannot work.
fn deadly() -> Outcome {
    /// Where the program is sent back to.
    static TO: AtomicU64 = AtomicU64::new(0);
    extern "C" fn mislead(_: c_int, _: *mut siginfo_t, given: *mut c_void) {
        // SAFETY: this is the handler.
        let registers = unsafe { &mut crate::sys::context(given).uc_mcontext.gregs };
        let index = |register: c_int| register.unsigned_abs() as usize;
        if TO.load(SeqCst) != 0 {
            registers[index(libc::REG_RIP)] = TO.load(SeqCst).cast_signed();
        }
    }
    let dies_of = |what: &str, signal: Signal, body: fn()| -> Outcome {
        let child = Child::start(|| {
            nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
            body();
            Ok(())
        })?;
        let status = child.wait()?;
        ensure!(
            matches!(status, WaitStatus::Signaled(_, found, _) if found == signal),
            "{what}: {status:?}"
        );
        Ok(())
    };
    for _ in 0..5 {
        dies_of("a write to nothing", Signal::SIGSEGV, || _ = write(16))?;
        dies_of("ud2", Signal::SIGILL, || _ = attempt!("ud2"))?;
        dies_of("int3", Signal::SIGTRAP, || _ = attempt!("int3"))?;
        dies_of("abort", Signal::SIGABRT, || std::process::abort())?;
        dies_of("back to no address", Signal::SIGSEGV, || {
            TO.store(0x0000_8000_0000_0000, SeqCst);
            let _ = handle(Signal::SIGUSR1, SaFlags::empty(), mislead);
            let _ = nix::sys::signal::raise(Signal::SIGUSR1);
        })?;
        dies_of("a stack that is none", Signal::SIGSEGV, || {
            let _ = handle(Signal::SIGSEGV, SaFlags::empty(), note);
            // SAFETY: does not return: the handler has no stack to run on.
            unsafe { std::arch::asm!("mov rsp, 8", "push 1", options(noreturn)) }
        })?;
    }
    Ok(())
}

/// Caught on another stack; before that the stack grows by itself.
fn stack_overflow() -> Outcome {
    extern "C" fn told(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
        let here = 0u8;
        // SAFETY: this is the handler.
        let address = unsafe { (*info).si_addr() }.expose_provenance();
        let own = (&raw const here).expose_provenance();
        let stack = ALTERNATE.load(SeqCst);
        let on_it = (stack..stack + ALTERNATE_SIZE as u64).contains(&(own as u64));
        crate::sys::exit(if on_it && address.abs_diff(own) > PAGE {
            0
        } else {
            9
        });
    }
    #[inline(never)]
    fn deeper(depth: u64) -> u64 {
        let room = std::hint::black_box([depth; 256]);
        if depth == 0 {
            room[3]
        } else {
            deeper(depth - 1) + room[7]
        }
    }
    static ALTERNATE: AtomicU64 = AtomicU64::new(0);
    const ALTERNATE_SIZE: usize = 64 << 10;
    Child::start(|| {
        let stack = Mapping::private(ALTERNATE_SIZE)?;
        ALTERNATE.store(stack.address() as u64, SeqCst);
        let alternate = libc::stack_t {
            ss_sp: stack.pointer::<c_void>(0).cast(),
            ss_flags: 0,
            ss_size: ALTERNATE_SIZE,
        };
        // SAFETY: memory that stays mapped until the process ends.
        nix::errno::Errno::result(unsafe { libc::sigaltstack(&raw const alternate, std::ptr::null_mut()) })?;
        handle(Signal::SIGSEGV, SaFlags::SA_ONSTACK, told)?;
        ensure!(deeper(1000) > 0, "2 MiB of stack");
        std::hint::black_box(deeper(u64::MAX));
        ensure!(false, "a stack without end");
        Ok(())
    })?
    .join()
}

// siginfo's codes that the libc crate does not have for all targets.
const SEGV_MAPERR: c_int = 1;
const SEGV_ACCERR: c_int = 2;
const BUS_ADRALN: c_int = 1;
const BUS_ADRERR: c_int = 2;
const ILL_ILLOPN: c_int = 2;
const FPE_INTDIV: c_int = 1;
const FPE_FLTDIV: c_int = 3;
const TRAP_TRACE: c_int = 2;
