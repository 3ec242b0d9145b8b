//! Tests that share one environment, whose set-up is expensive. They run one after the other.

use std::time::Instant;

use anyhow::{Result, ensure};

/// The environment that the tests of a suite share.
pub trait World: Sized {
    /// Sets up the environment.
    ///
    /// # Errors
    /// If a part of it does not start.
    fn start() -> Result<Self>;

    /// Restores the environment after the previous test.
    ///
    /// # Errors
    /// If a part of it does not recover.
    fn ready(&mut self) -> Result<()>;

    /// State of the environment, to explain a failed test.
    fn explain(&self) -> String;

    /// Removes what a test created.
    fn clean_up(&mut self);
}

/// A test and its name.
pub type Test<W> = (&'static str, fn(&mut W) -> Result<()>);

/// Runs the tests whose names contain one of the program's arguments; without arguments, all tests. Returns true if all
/// passed.
///
/// # Errors
/// If no name matches, or the environment does not start.
pub fn run<W: World>(tests: &[Test<W>]) -> Result<bool> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let chosen: Vec<_> = tests.iter().filter(|(name, _)| is_wanted(name)).collect();
    ensure!(!chosen.is_empty(), "no test matches {wanted:?}");
    let began = Instant::now();
    let mut world = W::start()?;
    println!("set up in {:.0} s", began.elapsed().as_secs_f64());
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in chosen {
        let began = Instant::now();
        let result = world.ready().and_then(|()| test(&mut world));
        let took = began.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("test {name} ... ok ({took:.1} s)");
            }
            Err(error) => {
                failed += 1;
                println!("test {name} ... FAILED ({took:.1} s)\n{error:?}\n{}", world.explain());
            }
        }
        world.clean_up();
    }
    println!("\n{passed} passed, {failed} failed");
    Ok(failed == 0)
}
