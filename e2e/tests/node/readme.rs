//! What the README has people do on Kubernetes, done as they would. Its first example, the installation, was done when
//! the world was made.

use anyhow::{Context, Result};
use e2e::cluster::until;
use e2e::document::{Step, examples};
use e2e::suite::World as _;

use crate::world::World;

pub(crate) fn the_readme_leads_to_a_vm_with_a_share(world: &mut World) -> Result<()> {
    let mut steps = examples("README.md", "### Kubernetes")?.into_iter().skip(1).flatten().peekable();
    let mut attached = false;
    while let Some(step) = steps.next() {
        let Step::Shell(command) = step else { anyhow::bail!("{step:?}: there is no console to type it into") };
        if command.starts_with("kubectl attach") {
            let mut typed = String::new();
            while let Some(Step::Guest(line)) = steps.next_if(|step| matches!(step, Step::Guest(_))) {
                typed += &format!("{line}\n");
            }
            sit_at_the_console(world, &command, &typed)?;
            world.until_export("images", "one session", |export| export["status"]["sessions"] == 1)?;
            attached = true;
        } else {
            println!("$ {command}\n{}", world.cluster.shell(&command, "")?);
        }
    }
    attached.then_some(()).context("the README attaches to no guest")
}

/// Attaches, types, and leaves when there was an answer.
fn sit_at_the_console(world: &World, attach: &str, typed: &str) -> Result<()> {
    let console = |what: &str, wanted: &str| {
        until(
            what,
            || world.explain(),
            || {
                let seen = world.admin().run(&["logs", "vm"])?;
                Ok(seen.contains(wanted).then_some(seen))
            },
        )
    };
    console("a shell in the guest", "built-in shell")?;
    // kubectl asks for a terminal, which `script` is.
    let sitting = format!("(cat; sleep 3) | timeout 10 script --quiet --command '{attach}' /dev/null || true");
    world.cluster.shell(&sitting, typed)?;
    let seen = console("the guest to see the share", "\nfrom the node")?;
    let from = seen.find("built-in shell").unwrap_or_default();
    println!("{}", &seen[from..]);
    Ok(())
}
