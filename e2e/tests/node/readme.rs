//! Runs the commands of the README's section on Kubernetes. Its first example, the installation, ran when the
//! environment was set up.

use anyhow::{Context, Result};
use e2e::cluster::until;
use e2e::document::{Step, examples};
use e2e::suite::World as _;

use crate::world::World;

pub(crate) fn the_readme_leads_to_a_vm_with_a_share(world: &mut World) -> Result<()> {
    let mut steps = examples("README.md", "### Kubernetes")?.into_iter().skip(1).flatten().peekable();
    let mut attached = false;
    while let Some(step) = steps.next() {
        let Step::Shell(command) = step else { anyhow::bail!("{step:?}: no console is attached") };
        if command.starts_with("kubectl attach") {
            let mut typed = String::new();
            while let Some(Step::Guest(line)) = steps.next_if(|step| matches!(step, Step::Guest(_))) {
                typed += &format!("{line}\n");
            }
            use_console(world, &command, &typed)?;
            world.until_export("images", "one session", |export| export["status"]["sessions"] == 1)?;
            attached = true;
        } else {
            println!("$ {command}\n{}", world.cluster.shell(&command, "")?);
        }
    }
    attached.then_some(()).context("the README has no `kubectl attach`")
}

/// Attaches to the guest's console, types `typed`, and detaches after the answer.
fn use_console(world: &World, attach: &str, typed: &str) -> Result<()> {
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
    // kubectl needs a terminal, which `script` provides.
    let session = format!("(cat; sleep 3) | timeout 10 script --quiet --command '{attach}' /dev/null || true");
    world.cluster.shell(&session, typed)?;
    let seen = console("the guest to read the share", "\nfrom the node")?;
    let from = seen.find("built-in shell").unwrap_or_default();
    println!("{}", &seen[from..]);
    Ok(())
}
