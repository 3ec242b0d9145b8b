//! What the README has people do on Kubernetes, to be done word for word.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const SECTION: &str = "### Kubernetes";

/// Something to be typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Into a shell on the admin's machine or on the node.
    Shell(String),
    /// Into the console of the guest that the shell was attached to.
    Guest(String),
}

/// The steps of each example in the section, in order.
///
/// # Errors
/// When the README has no such section, or no step in it.
pub fn examples() -> Result<Vec<Vec<Step>>> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = fs::read_to_string(&readme).context("reading the README")?;
    let (_, section) = text.split_once(SECTION).context("the README has no section on Kubernetes")?;
    let section = section.split("\n#").next().unwrap_or_default();
    let fenced = section.split("```console\n").skip(1).filter_map(|rest| rest.split("\n```").next());
    let examples: Vec<_> = fenced.map(steps).filter(|steps| !steps.is_empty()).collect();
    ensure!(!examples.is_empty(), "the README's section on Kubernetes has nothing to do in it");
    Ok(examples)
}

/// Lines after a prompt, with what continues them; all others are what is printed.
fn steps(example: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut lines = example.lines();
    while let Some(line) = lines.next() {
        if let Some(command) = line.strip_prefix("guest# ") {
            steps.push(Step::Guest(command.to_owned()));
        } else if let Some(command) = line.strip_prefix("$ ") {
            let mut command = command.to_owned();
            while command.ends_with('\\') || (command.contains("<<'EOF'") && !command.ends_with("\nEOF")) {
                let Some(more) = lines.next() else { break };
                command.push('\n');
                command.push_str(more);
            }
            steps.push(Step::Shell(command));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_steps_and_the_rest_is_printed() {
        let example = "$ one \\\n    --more\nprinted\n$ two <<'EOF'\na: $ 1\nEOF\n$ attach\nguest# mount\nprinted";
        let shell = |text: &str| Step::Shell(text.to_owned());
        let expected = [
            shell("one \\\n    --more"),
            shell("two <<'EOF'\na: $ 1\nEOF"),
            shell("attach"),
            Step::Guest("mount".to_owned()),
        ];
        assert_eq!(steps(example), expected);
    }
}
