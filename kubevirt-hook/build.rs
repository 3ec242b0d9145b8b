//! Generates messages and services from the two protocols, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protocols = ["info.proto", "callbacks.proto"];
    for protocol in protocols {
        println!("cargo:rerun-if-changed=proto/{protocol}");
    }
    let descriptors = protox::compile(protocols, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
