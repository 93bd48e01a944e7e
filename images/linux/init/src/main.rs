//! Init of the Linux image: mounts what every program expects, runs one command, reports its exit status and ends the machine.
#![no_std]
#![no_main]

mod system;

use core::ffi::{CStr, c_char};

use guest_init::{exit_status, percent_decode};
use guest_rt as _;

use system::{Error, NO_SUCH_FILE, Process};

/// Where a command without a slash is looked for.
const SEARCH: [&CStr; 4] = [c"/bin/", c"/sbin/", c"/usr/bin/", c"/usr/sbin/"];
const PATH_VARIABLE: &CStr = c"PATH=/bin:/sbin:/usr/bin:/usr/sbin";
/// Most environment variables that are passed on, with PATH.
const MAX_ENVIRONMENT: usize = 32;
const PATH_SIZE: usize = 4096;

/// Statuses of a shell for a command that could not be run.
const STATUS_NOT_FOUND: u8 = 127;
const STATUS_NOT_EXECUTABLE: u8 = 126;

/// Called by `_start` with the stack as the kernel made it: argument count, arguments, NULL, environment, NULL.
///
/// # Safety
/// `stack` must be that stack.
unsafe extern "C" fn run(stack: *mut usize) -> ! {
    if system::process_id() != 1 {
        system::complain(&[c"not process 1, nothing to do"]);
        system::exit(1);
    }
    // SAFETY: the caller's promise; the arguments start one word up and the environment after the arguments' NULL.
    let (arguments, environment) = unsafe {
        let count = *stack;
        let arguments: *mut *mut c_char = stack.add(1).cast();
        (
            core::slice::from_raw_parts_mut(arguments, count + 1),
            arguments.add(count + 1),
        )
    };
    mount_all();
    system::take_terminal();

    let mut shell = [
        c"init".as_ptr().cast_mut(),
        c"sh".as_ptr().cast_mut(),
        core::ptr::null_mut(),
    ];
    let command = if arguments.len() > 2 {
        decode(arguments);
        &mut arguments[1..]
    } else {
        &mut shell[1..]
    };
    // SAFETY: the environment ends with NULL, as the kernel made it.
    let environment = unsafe { with_path(environment.cast()) };

    let status = match system::fork() {
        Ok(Process::Child) => become_command(command, &environment),
        Ok(Process::Parent(child)) => wait_for(child),
        Err(error) => {
            system::complain(&[c"cannot start a process: ", error.as_text()]);
            STATUS_NOT_EXECUTABLE
        }
    };
    system::end_machine(status);
}

/// A root that already holds some of these is no reason not to run the command: errors are left to whoever misses something.
fn mount_all() {
    for (kind, target) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"tmpfs", c"/tmp"),
        (c"devpts", c"/dev/pts"),
        (c"tmpfs", c"/dev/shm"),
    ] {
        // Those below /dev are not there yet.
        let _ = system::make_directory(target);
        if let Err(error) = system::mount(kind, target) {
            system::complain(&[c"cannot mount ", target, c": ", error.as_text()]);
        }
    }
}

/// Decodes every argument in place.
fn decode(arguments: &mut [*mut c_char]) {
    for &mut argument in arguments {
        if argument.is_null() {
            continue;
        }
        // SAFETY: the kernel put a string there, writable as all of the stack, and nobody else knows it.
        let text = unsafe {
            let length = CStr::from_ptr(argument).count_bytes();
            core::slice::from_raw_parts_mut(argument.cast::<u8>(), length + 1)
        };
        let end = text.len() - 1;
        let length = percent_decode(&mut text[..end]);
        text[length] = 0;
    }
}

/// The environment with a PATH, unless it has one.
///
/// # Safety
/// `environment` must be a list of strings that ends with NULL.
unsafe fn with_path(mut environment: *const *const c_char) -> [*const c_char; MAX_ENVIRONMENT + 1] {
    let mut list = [core::ptr::null(); MAX_ENVIRONMENT + 1];
    list[0] = PATH_VARIABLE.as_ptr();
    for slot in &mut list[1..MAX_ENVIRONMENT] {
        // SAFETY: not beyond the NULL: the loop ends there.
        unsafe {
            if (*environment).is_null() {
                break;
            }
            *slot = *environment;
            environment = environment.add(1);
        }
    }
    list
}

/// In the child: runs the command. `command` ends with NULL.
fn become_command(command: &mut [*mut c_char], environment: &[*const c_char]) -> ! {
    // SAFETY: `run` gives at least one argument before the NULL.
    let name = unsafe { CStr::from_ptr(command[0]) };
    let mut outcome = Err(NO_SUCH_FILE);
    if name.to_bytes().contains(&b'/') {
        outcome = system::execute(name, command, environment);
    } else {
        for directory in SEARCH {
            let mut path = [0; PATH_SIZE];
            if let Some(path) = join(&mut path, directory, name) {
                outcome = system::execute(path, command, environment);
            }
            if outcome != Err(NO_SUCH_FILE) {
                break;
            }
        }
    }
    let Err(error) = outcome;
    system::complain(&[c"cannot run '", name, c"': ", error.as_text()]);
    let status = if error == NO_SUCH_FILE {
        STATUS_NOT_FOUND
    } else {
        STATUS_NOT_EXECUTABLE
    };
    system::exit(status);
}

/// `directory` and `name`, if they fit.
fn join<'a>(path: &'a mut [u8], directory: &CStr, name: &CStr) -> Option<&'a CStr> {
    let (directory, name) = (directory.to_bytes(), name.to_bytes_with_nul());
    let length = directory.len() + name.len();
    path.get_mut(..directory.len())?.copy_from_slice(directory);
    path.get_mut(directory.len()..length)?.copy_from_slice(name);
    CStr::from_bytes_with_nul(&path[..length]).ok()
}

/// Waits for the command to end; orphans that end before are buried on the way.
fn wait_for(child: i32) -> u8 {
    loop {
        match system::wait_any() {
            Ok((process, status)) if process == child => return exit_status(status),
            Ok(_) | Err(Error::INTERRUPTED) => {}
            Err(error) => {
                system::complain(&[c"cannot wait: ", error.as_text()]);
                return STATUS_NOT_EXECUTABLE;
            }
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    system::complain(&[c"internal error"]);
    system::exit(STATUS_NOT_EXECUTABLE);
}
