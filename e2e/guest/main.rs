//! guest-load: runs loads on file systems inside a guest and counts errors and wrong results.
//!
//! `guest-load [--read DIR] [--list FILE] [--most FILES] [--write DIR] [--sparse DIR] (--rounds N | --until FILE)`
//! prints one line of JSON. The guest counts, because the counters of a virtiofs engine do not include errors that the
//! guest kernel generates.

#![allow(
    unreachable_pub,
    reason = "pattern.rs is public where the library includes it; the other modules are the same"
)]

use std::path::{Path, PathBuf};

mod listed;
mod pattern;
mod reader;
mod sparse;
mod tally;
mod writer;

use listed::Listed;
use reader::Reader;
use sparse::Sparse;
use tally::Tally;
use writer::Writer;

enum End {
    Rounds(u64),
    Until(PathBuf),
}

impl End {
    fn reached(&self, rounds: u64) -> bool {
        match self {
            Self::Rounds(wanted) => rounds >= *wanted,
            Self::Until(file) => file.exists(),
        }
    }
}

struct Arguments {
    read: Option<PathBuf>,
    list: Option<PathBuf>,
    most: u64,
    write: Option<PathBuf>,
    sparse: Option<PathBuf>,
    end: End,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed =
            Self { read: None, list: None, most: u64::MAX, write: None, sparse: None, end: End::Rounds(1) };
        while let Some(option) = words.next() {
            let value = words.next().ok_or_else(|| format!("{option} needs a value"))?;
            match option.as_str() {
                "--read" => parsed.read = Some(value.into()),
                "--list" => parsed.list = Some(value.into()),
                "--most" => parsed.most = number(&option, &value)?,
                "--write" => parsed.write = Some(value.into()),
                "--sparse" => parsed.sparse = Some(value.into()),
                "--rounds" => parsed.end = End::Rounds(number(&option, &value)?),
                "--until" => parsed.end = End::Until(value.into()),
                _ => {
                    return Err(format!(
                        "unknown option {option}; use one of --read, --list, --most, --write, --sparse, --rounds, --until"
                    ));
                }
            }
        }
        Ok(parsed)
    }
}

fn number(option: &str, value: &str) -> Result<u64, String> {
    value.parse().map_err(|_| format!("{option} needs a number, not {value}"))
}

fn main() {
    if let Err(problem) = run() {
        eprintln!("guest-load: {problem}");
        std::process::exit(2);
    }
}

fn run() -> Result<(), String> {
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    let enter = |path: &Path, error| format!("{}: {error}", path.display());
    let most = arguments.most;
    let reader = arguments.read.map(|dir| Reader::enter(&dir, most).map_err(|e| enter(&dir, e))).transpose()?;
    let listed = arguments.list.map(|list| Listed::enter(&list, most).map_err(|e| enter(&list, e))).transpose()?;
    let mut writer = arguments.write.map(|dir| Writer::enter(&dir).map_err(|e| enter(&dir, e))).transpose()?;
    let sparse = arguments.sparse.map(|dir| Sparse::enter(&dir).map_err(|e| enter(&dir, e))).transpose()?;

    let (mut tally, mut rounds) = (Tally::default(), 0);
    while !arguments.end.reached(rounds) {
        if let Some(reader) = &reader {
            reader.round(&mut tally);
        }
        if let Some(listed) = &listed {
            listed.round(&mut tally);
        }
        if let Some(writer) = &mut writer {
            writer.round(rounds, &mut tally);
        }
        if let Some(sparse) = &sparse {
            sparse.round(rounds, &mut tally);
        }
        rounds += 1;
    }
    if let Some(writer) = writer {
        writer.finish(rounds, &mut tally);
    }
    println!("{}", tally.json(rounds));
    Ok(())
}
