//! Generates the `Pod` service from its proto file, without protoc.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or(std::io::ErrorKind::NotFound)?);
    println!("cargo:rerun-if-changed=proto/pod.proto");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/pod.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    // The generated files open with inner attributes, so they must be modules of a file beside them; this
    // crate forbids unsafe code, which they allow and do not use.
    for file in ["pod.rs", "pod_ttrpc.rs"] {
        let path = out.join(file);
        let source = std::fs::read_to_string(&path)?;
        std::fs::write(&path, source.replace("#![allow(unsafe_code)]", ""))?;
    }
    std::fs::write(out.join("mod.rs"), "pub mod pod;\npub mod pod_ttrpc;\n")
}
