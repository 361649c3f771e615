//! Generates the `Guest` service from its proto file, without protoc.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or(std::io::ErrorKind::NotFound)?);
    println!("cargo:rerun-if-changed=proto/guest.proto");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/guest.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The generated files open with inner attributes, so they must be modules of a file beside them.
    std::fs::write(out.join("mod.rs"), "pub mod guest;\npub mod guest_ttrpc;\n")
}
