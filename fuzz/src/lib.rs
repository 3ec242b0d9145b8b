//! Fuzzing on stable Rust, in ordinary tests: a target replays its corpus, then mutates it for a bounded time.
//!
//! The corpus of a target is `fuzz/corpus/TARGET/`, a file for each input. An input at which a target panics is written there,
//! as `failure-HASH`, so that every later run begins with it. `FUZZ_SECONDS` sets how long each target mutates (default 1), and
//! `FUZZ_SEED` the seed, which is printed.
//!
//! There is no feedback from coverage. A target says instead which inputs it accepted: these are mutated further.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Most inputs that are mutated further.
const POOL: usize = 2000;

/// Most bytes of an input that was mutated.
const LONGEST: usize = 1 << 16;

/// Longest time that one input may take.
const SLOW: Duration = Duration::from_secs(10);

/// Values at which arithmetic goes wrong.
const NUMBERS: [u64; 12] =
    [0, 1, 2, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, 1 << 63, u64::MAX];

/// Replays the corpus of a target, then mutates it. `words`: parts that are inserted into inputs. `test` returns true if it
/// accepted an input as valid.
///
/// # Panics
/// If `test` panics or takes 10 s. If the corpus is missing, or has no input that is accepted: it would test nothing.
pub fn run(target: &str, words: &[&[u8]], mut test: impl FnMut(&[u8]) -> bool) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut pool = read(&corpus);
    let mut accepted = 0u64;
    for (name, input) in &pool {
        println!("{target}: {name}");
        accepted += u64::from(one(&corpus, input, &mut test));
    }
    assert!(accepted > 0, "{}: no input is valid", corpus.display());
    let seed = number("FUZZ_SEED").unwrap_or_else(|| rand::rng().random());
    let end = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(1));
    println!("{target}: FUZZ_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut executions = pool.len() as u64;
    while Instant::now() < end {
        let input = mutated(&mut rng, &pool, words);
        executions += 1;
        if one(&corpus, &input, &mut test) {
            accepted += 1;
            let name = format!("mutation {executions}");
            match pool.len() {
                POOL => pool[rng.random_range(0..POOL)] = (name, input),
                _ => pool.push((name, input)),
            }
        }
    }
    println!("{target}: {executions} inputs, {accepted} of them valid");
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn read(corpus: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut inputs: Vec<_> = entries
        .flatten()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap_or_default()))
        .collect();
    inputs.sort();
    inputs
}

/// Tests one input. Stores it if the test panics.
fn one(corpus: &Path, input: &[u8], test: &mut impl FnMut(&[u8]) -> bool) -> bool {
    let begin = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let accepted = test(input);
        assert!(begin.elapsed() < SLOW, "this input took {:?}", begin.elapsed());
        accepted
    }));
    result.unwrap_or_else(|panic| {
        let mut hash = DefaultHasher::new();
        input.hash(&mut hash);
        let file = corpus.join(format!("failure-{:016x}", hash.finish()));
        eprintln!("the input is {}: {:?}", file.display(), fs::write(&file, input));
        resume_unwind(panic)
    })
}

fn mutated(rng: &mut StdRng, pool: &[(String, Vec<u8>)], words: &[&[u8]]) -> Vec<u8> {
    let any = |rng: &mut StdRng| pool.choose(rng).map_or_else(Vec::new, |(_, input)| input.clone());
    let mut input = any(rng);
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..=input.len());
        let end = (at + rng.random_range(0..32)).min(input.len());
        match rng.random_range(0..8) {
            0 => input.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << rng.random_range(0..8)),
            1 => input.iter_mut().skip(at).take(1).for_each(|byte| *byte = rng.random()),
            2 => drop(input.drain(at..end)),
            3 => {
                let again = input[at..end].to_vec();
                input.splice(at..at, again);
            }
            4 => {
                let number = NUMBERS[rng.random_range(0..NUMBERS.len())].to_le_bytes();
                let width = 1 << rng.random_range(0..4);
                let end = (at + width).min(input.len());
                input.splice(at..end, number[..width].iter().copied());
            }
            5 => {
                let digits = NUMBERS[rng.random_range(0..NUMBERS.len())].to_string();
                input.splice(at..at, digits.into_bytes());
            }
            6 => {
                let word = words.choose(rng).map_or_else(Vec::new, |word| word.to_vec());
                input.splice(at..end, word);
            }
            // The beginning of one input and the end of another.
            _ => {
                let other = any(rng);
                let from = rng.random_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(LONGEST);
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutations_differ_and_are_bounded() {
        let mut rng = StdRng::seed_from_u64(1);
        let pool = [("a".to_owned(), b"kind: VirtiofsShare\n".to_vec()), ("b".to_owned(), vec![0; LONGEST])];
        let inputs: Vec<_> = (0..1000).map(|_| mutated(&mut rng, &pool, &[b"word"])).collect();
        assert!(inputs.iter().all(|input| input.len() <= LONGEST));
        assert!(inputs.iter().any(|input| input.windows(4).any(|it| it == b"word")));
        let distinct: std::collections::BTreeSet<_> = inputs.iter().collect();
        assert!(distinct.len() > 900, "{}", distinct.len());
    }

    #[test]
    fn failing_input_is_stored() {
        let scratch = std::env::temp_dir().join(format!("fuzz-{}", std::process::id()));
        fs::create_dir_all(&scratch).unwrap();
        let failed = catch_unwind(|| one(&scratch, b"bad", &mut |input| input != b"bad" || panic!("found")));
        assert!(failed.is_err());
        assert_eq!(read(&scratch).into_iter().map(|it| it.1).collect::<Vec<_>>(), [b"bad".to_vec()]);
        fs::remove_dir_all(&scratch).unwrap();
    }
}
