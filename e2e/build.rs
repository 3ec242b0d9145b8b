//! Builds the program that works inside the guest: one file, the standard library only, linked statically
//! because an initramfs has no libc. Cargo cannot give one binary of a package its own target features,
//! so the compiler is called here.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=guest");
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("guest-load");
    let status = Command::new(env::var_os("RUSTC").expect("cargo sets RUSTC"))
        .args(["--edition=2024", "--crate-name=guest_load", "--crate-type=bin", "guest/main.rs"])
        .args(["-Ctarget-feature=+crt-static", "-Copt-level=2", "-Cpanic=abort", "-Cstrip=symbols"])
        .arg("-o")
        .arg(&out)
        .status()
        .expect("rustc starts");
    assert!(status.success(), "guest/main.rs does not compile: {status}");
}
