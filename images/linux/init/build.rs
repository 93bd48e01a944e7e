//! Links the binary statically and without a C library: it makes its own system calls.

fn main() {
    // Nothing unwinds, but `core` as shipped still names the function that would.
    let no_unwinding = "-Wl,--defsym=rust_eh_personality=0";
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        no_unwinding,
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
