//! Finds the endpoints or the session that a person named.

use anyhow::{Result, anyhow};
use virtiofs_client::endpoint::share_of;
use virtiofs_contract::control::{EndpointStatus, SessionStatus, Status};
use virtiofs_crds::nearest;

/// The endpoints of a share, its own first; at least one.
pub(crate) fn endpoints<'a>(status: &'a Status, share: &str) -> Result<Vec<&'a EndpointStatus>> {
    let mut found: Vec<_> = status.endpoints.iter().filter(|it| share_of(&it.endpoint.name) == share).collect();
    if found.is_empty() {
        let known = status.endpoints.iter().map(|it| share_of(&it.endpoint.name));
        return Err(unknown("share", share, known));
    }
    found.sort_by_key(|it| it.endpoint.name != share);
    Ok(found)
}

/// The session with this id, and its endpoint.
pub(crate) fn session<'a>(status: &'a Status, id: &str) -> Result<(&'a EndpointStatus, &'a SessionStatus)> {
    let all = || status.endpoints.iter().flat_map(|it| it.sessions.iter().map(move |session| (it, session)));
    all().find(|(_, session)| session.id == id).ok_or_else(|| unknown("session", id, all().map(|it| it.1.id.as_str())))
}

fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> anyhow::Error {
    let guess = nearest(name, known).map(|near| format!(" Did you mean {near:?}?")).unwrap_or_default();
    anyhow!("the broker serves no {what} {name:?}.{guess} `virtiofsctl status` shows what it serves")
}

#[cfg(test)]
mod tests {
    use virtiofs_client::fixtures::{self, endpoint, listening};

    use super::*;

    fn status(names: &[&str]) -> Status {
        fixtures::status(1, names.iter().map(|name| listening(endpoint(name))).collect())
    }

    #[test]
    fn a_shares_own_endpoint_comes_first() {
        let status = status(&["images", "images.vm-1", "images2", "images.vm-0"]);
        let names: Vec<_> = endpoints(&status, "images").unwrap().iter().map(|it| it.endpoint.name.as_str()).collect();
        assert_eq!(names, ["images", "images.vm-1", "images.vm-0"]);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest() {
        let error = endpoints(&status(&["images", "projects"]), "imagse").unwrap_err().to_string();
        assert!(error.contains("\"imagse\"") && error.contains("Did you mean \"images\"?"), "{error}");
        let error = endpoints(&status(&["images"]), "\u{1b}[31m").unwrap_err().to_string();
        assert!(error.contains(r"\u{1b}[31m") && !error.contains("mean"), "{error}");
        assert!(session(&status(&[]), "images-1").unwrap_err().to_string().contains("no session \"images-1\""));
    }
}
