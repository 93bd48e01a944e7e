//! Compiles the .proto files with protox, so that no protoc is needed, and keeps the descriptors for reflection.
use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["vm.proto", "node.proto", "cluster.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
