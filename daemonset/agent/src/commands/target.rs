//! What a command is about, found by the name that a person typed.

use anyhow::{Result, anyhow};
use virtiofs_contract::control::{EndpointStatus, SessionStatus, Status};
use virtiofs_crds::nearest;

use crate::offer::share_name;

/// The endpoints of a share, its own first. There is at least one.
pub(super) fn endpoints<'a>(status: &'a Status, share: &str) -> Result<Vec<&'a EndpointStatus>> {
    let mut found: Vec<_> = status.endpoints.iter().filter(|it| share_name(&it.endpoint.name) == share).collect();
    if found.is_empty() {
        let known = status.endpoints.iter().map(|it| share_name(&it.endpoint.name));
        return Err(unknown("share", share, known));
    }
    found.sort_by_key(|it| it.endpoint.name != share);
    Ok(found)
}

/// The session of this name, and the endpoint that it is at.
pub(super) fn session<'a>(status: &'a Status, id: &str) -> Result<(&'a EndpointStatus, &'a SessionStatus)> {
    let all = || status.endpoints.iter().flat_map(|it| it.sessions.iter().map(move |session| (it, session)));
    all().find(|(_, session)| session.id == id).ok_or_else(|| unknown("session", id, all().map(|it| it.1.id.as_str())))
}

fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> anyhow::Error {
    let guess = nearest(name, known).map(|near| format!(" Did you mean {near:?}?")).unwrap_or_default();
    anyhow!("the broker serves no {what} {name:?}.{guess} `virtiofs-agent status` shows what there is and why")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::tests::declared;
    use crate::plan::endpoint;
    use crate::plan::tests::{listening, site, source};

    fn status(names: &[&str]) -> Status {
        let at = |name: &&str| {
            let own = endpoint(&site().runtime_dir, &declared("x", "/srv/x"), &source("/srv/x", 2));
            listening(virtiofs_contract::control::Endpoint { name: (*name).to_owned(), ..own })
        };
        Status { endpoints: names.iter().map(at).collect(), ..crate::plan::tests::status(1, Vec::new()) }
    }

    #[test]
    fn a_share_is_all_its_endpoints_and_its_own_comes_first() {
        let status = status(&["images", "images.vm-1", "images2", "images.vm-0"]);
        let names: Vec<_> = endpoints(&status, "images").unwrap().iter().map(|it| it.endpoint.name.as_str()).collect();
        assert_eq!(names, ["images", "images.vm-1", "images.vm-0"]);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_one_that_was_meant() {
        let error = endpoints(&status(&["images", "projects"]), "imagse").unwrap_err().to_string();
        assert!(error.contains("\"imagse\"") && error.contains("Did you mean \"images\"?"), "{error}");
        let error = endpoints(&status(&["images"]), "\u{1b}[31m").unwrap_err().to_string();
        assert!(error.contains(r"\u{1b}[31m") && !error.contains("mean"), "{error}");
        assert!(session(&status(&[]), "images-1").unwrap_err().to_string().contains("no session \"images-1\""));
    }
}
