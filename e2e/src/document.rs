//! Extracts the commands of a Markdown document of this project, so that a test runs exactly what the document shows.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// A command of an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// For a shell on the admin's machine or on the node.
    Shell(String),
    /// For the console of the guest that the shell is attached to.
    Guest(String),
}

/// The commands of each example below a heading, in order. `document` is a path in this repository.
///
/// # Errors
/// If the document has no such section, or the section has no command.
pub fn examples(document: &str, heading: &str) -> Result<Vec<Vec<Step>>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(document);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {document}"))?;
    let examples: Vec<_> = fenced(&text, heading).iter().map(|example| steps(example)).collect();
    let examples: Vec<_> = examples.into_iter().filter(|steps| !steps.is_empty()).collect();
    ensure!(!examples.is_empty(), "{document}: no section '{heading}' with commands");
    Ok(examples)
}

/// The console blocks between a heading and the next one.
fn fenced(text: &str, heading: &str) -> Vec<String> {
    let (mut examples, mut inside) = (Vec::new(), false);
    // Language and text of the current block.
    let mut block: Option<(&str, String)> = None;
    for line in text.lines() {
        match (&mut block, line.strip_prefix("```")) {
            (None, Some(language)) => block = Some((language, String::new())),
            (None, None) if line.starts_with('#') => inside = line == heading,
            (None, None) => {}
            (Some(_), Some("")) => {
                let console = block.take().filter(|(language, _)| inside && *language == "console");
                examples.extend(console.map(|(_, example)| example));
            }
            (Some((_, example)), _) => *example += &format!("{line}\n"),
        }
    }
    examples
}

/// Lines after a prompt, with their continuation lines. All other lines are output.
fn steps(example: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut lines = example.lines();
    while let Some(line) = lines.next() {
        if let Some(command) = line.strip_prefix("guest# ") {
            steps.push(Step::Guest(command.to_owned()));
        } else if let Some(command) = line.strip_prefix("$ ").or_else(|| line.strip_prefix("# ")) {
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
    fn examples_belong_to_their_heading() {
        let text = "## One\n```console\n# one\n```\n```yaml\na: b\n```\n## Two\n```console\n$ two\n```\n### Three\n";
        assert_eq!(fenced(text, "## One"), ["# one\n"]);
        assert_eq!(fenced(text, "## Two"), ["$ two\n"]);
        assert!(fenced(text, "### Three").is_empty());
    }

    #[test]
    fn lines_after_prompts_are_steps() {
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
