//! Errors of reconcile steps, and how an error is printed.

use std::error::Error;
use std::fmt;

/// A step of a reconcile that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub(crate) struct StepError {
    /// The step and its object, such as `apply export images-n1-731330bf8d`.
    step: String,
    /// The error of the client.
    #[source]
    cause: kube::Error,
}

/// Adds the step to a client's error.
pub(crate) trait Step<T> {
    /// The same result, with the step that it is of.
    fn step(self, step: impl FnOnce() -> String) -> Result<T, StepError>;
}

impl<T> Step<T> for kube::Result<T> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, StepError> {
        self.map_err(|cause| StepError { step: step(), cause })
    }
}

impl StepError {
    /// True if the object is gone, or another one has its name.
    pub(crate) fn is_gone(&self) -> bool {
        is_gone(&self.cause)
    }
}

/// True if the object of a request is gone, or another one has its name.
pub(crate) fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.code == 409)
}

/// Prints an error and its causes in one line, each once. Errors of the client repeat their cause in their own text.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut next, mut separator) = (Some(self.0), "");
        while let Some(error) = next {
            let (text, cause) = own_text(error);
            if !text.is_empty() {
                write!(f, "{separator}{text}")?;
                separator = ": ";
            }
            next = cause;
        }
        Ok(())
    }
}

/// The text of an error without that of its cause, and the cause.
fn own_text<'a>(error: &'a (dyn Error + 'static)) -> (String, Option<&'a (dyn Error + 'static)>) {
    // Its own text would be followed by the whole status in debug format.
    if let Some(kube::Error::Api(status)) = error.downcast_ref() {
        return (format!("{} (HTTP {})", status.message, status.code), None);
    }
    let text = error.to_string();
    let Some(cause) = error.source() else { return (text, None) };
    let own = text.strip_suffix(&cause.to_string()).unwrap_or(&text);
    (own.trim_end_matches([' ', ':']).to_owned(), Some(cause))
}

#[cfg(test)]
mod tests {
    use kube::core::Status;
    use kube::runtime::watcher;

    use super::*;

    fn forbidden() -> kube::Error {
        kube::Error::Api(Box::new(Status::failure("exports are forbidden", "Forbidden").with_code(403)))
    }

    #[test]
    fn a_failed_step_is_named_and_its_cause_printed_once() {
        let error = Err::<(), _>(forbidden()).step(|| "apply export images-n1".to_owned()).unwrap_err();
        assert_eq!(Chain(&error).to_string(), "cannot apply export images-n1: exports are forbidden (HTTP 403)");
        let error = watcher::Error::InitialListFailed(forbidden());
        assert_eq!(
            Chain(&error).to_string(),
            "failed to perform initial object list: exports are forbidden (HTTP 403)"
        );
    }

    #[test]
    fn a_cause_that_its_error_repeats_is_printed_once() {
        let cause = std::io::Error::other("connection refused");
        let error = kube::Error::ReadEvents(cause);
        assert_eq!(Chain(&error).to_string(), "Error reading events stream: connection refused");
        let error = anyhow::Error::new(error).context("cannot list pods");
        assert_eq!(
            Chain(error.as_ref()).to_string(),
            "cannot list pods: Error reading events stream: connection refused"
        );
    }
}
