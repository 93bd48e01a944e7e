//! Links the binary as a bare-metal ELF: our own layout, no C runtime, no position independence.

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rerun-if-changed=src/boot.s");
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for every build script");
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
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{directory}/link.ld");
}
