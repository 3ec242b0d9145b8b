//! Generates files from the types of this crate; with `--check`, fails if the committed ones are stale.

mod files;
mod reference;
mod wording;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => files::write(),
        ["--check"] => files::check(),
        _ => {
            eprintln!("usage: crdgen [--check]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}
