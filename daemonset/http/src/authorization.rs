//! Whether a client may read a page: the API server authenticates its bearer token (TokenReview) and authorizes `get` of the
//! page's path (SubjectAccessReview), as kube-rbac-proxy does it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

/// How long an authorized token is not reviewed again.
const VALID: Duration = Duration::from_secs(60);
/// Largest number of authorized tokens that are remembered.
const REMEMBERED: usize = 32;
/// Reviews in progress; others wait in order of their arrival, so that no client can keep another waiting for long.
const CONCURRENT: usize = 2;

/// The result of a review.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Authorized,
    /// No token, or one that the API server does not know.
    Unauthenticated,
    /// A known user without the permission.
    Forbidden,
}

/// Reviews clients.
pub struct Reviewer {
    client: Client,
    authorized: Mutex<Authorized>,
    slots: Semaphore,
}

impl Reviewer {
    /// A reviewer that asks this API server.
    pub fn new(client: Client) -> Self {
        Reviewer { client, authorized: Mutex::default(), slots: Semaphore::new(CONCURRENT) }
    }

    async fn review(&self, token: &str, path: &str) -> kube::Result<Verdict> {
        if self.remembered(token, path) {
            return Ok(Verdict::Authorized);
        }
        // The semaphore is never closed.
        let _slot = self.slots.acquire().await;
        if self.remembered(token, path) {
            return Ok(Verdict::Authorized);
        }
        let Some(user) = self.authenticate(token).await? else { return Ok(Verdict::Unauthenticated) };
        if !self.authorize(user, path).await? {
            return Ok(Verdict::Forbidden);
        }
        self.lock().put(token, path, Instant::now());
        Ok(Verdict::Authorized)
    }

    fn remembered(&self, token: &str, path: &str) -> bool {
        self.lock().contains(token, path, Instant::now())
    }

    async fn authenticate(&self, token: &str) -> kube::Result<Option<UserInfo>> {
        let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
        let reviewed = self.create(TokenReview { spec, ..TokenReview::default() }).await?;
        let status = reviewed.status.unwrap_or_default();
        Ok(status.user.filter(|_| status.authenticated == Some(true)))
    }

    async fn authorize(&self, user: UserInfo, path: &str) -> kube::Result<bool> {
        let page = NonResourceAttributes { path: Some(path.to_owned()), verb: Some("get".to_owned()) };
        let spec = SubjectAccessReviewSpec {
            user: user.username,
            groups: user.groups,
            uid: user.uid,
            extra: user.extra,
            non_resource_attributes: Some(page),
            ..SubjectAccessReviewSpec::default()
        };
        let reviewed = self.create(SubjectAccessReview { spec, ..SubjectAccessReview::default() }).await?;
        Ok(reviewed.status.is_some_and(|status| status.allowed))
    }

    async fn create<K>(&self, review: K) -> kube::Result<K>
    where
        K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
    {
        Api::<K>::all(self.client.clone()).create(&PostParams::default(), &review).await
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Authorized> {
        self.authorized.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a request pass if its client is authorized; a layer of a router.
pub async fn require(State(reviewer): State<Arc<Reviewer>>, request: Request, next: Next) -> Response {
    let verdict = match bearer(&request) {
        Some(token) => reviewer.review(&token, request.uri().path()).await,
        None => Ok(Verdict::Unauthenticated),
    };
    match verdict {
        Ok(Verdict::Authorized) => next.run(request).await,
        Ok(Verdict::Unauthenticated) => {
            (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], "a bearer token is needed\n")
                .into_response()
        }
        Ok(Verdict::Forbidden) => {
            (StatusCode::FORBIDDEN, "the token does not permit to get this page\n").into_response()
        }
        Err(error) => {
            tracing::warn!(%error, "a client of the metrics could not be reviewed");
            (StatusCode::SERVICE_UNAVAILABLE, "the API server does not review tokens now\n").into_response()
        }
    }
}

fn bearer(request: &Request) -> Option<String> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then(|| token.to_owned())
}

/// Tokens that were authorized recently, with the path and the time.
#[derive(Default)]
struct Authorized(HashMap<(String, String), Instant>);

impl Authorized {
    fn contains(&self, token: &str, path: &str, now: Instant) -> bool {
        let at = self.0.get(&(token.to_owned(), path.to_owned()));
        at.is_some_and(|at| now.saturating_duration_since(*at) < VALID)
    }

    fn put(&mut self, token: &str, path: &str, now: Instant) {
        self.0.retain(|_, at| now.saturating_duration_since(*at) < VALID);
        if self.0.len() >= REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, at)| **at).map(|(key, _)| key.clone());
            oldest.map(|key| self.0.remove(&key));
        }
        self.0.insert((token.to_owned(), path.to_owned()), now);
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn authorized_tokens_are_remembered_for_a_minute() {
        let (mut authorized, start) = (Authorized::default(), Instant::now());
        authorized.put("a", "/metrics", start);
        assert!(authorized.contains("a", "/metrics", start));
        assert!(!authorized.contains("a", "/other", start) && !authorized.contains("b", "/metrics", start));
        assert!(!authorized.contains("a", "/metrics", start + VALID));
        for token in 0..2 * REMEMBERED {
            authorized.put(&token.to_string(), "/metrics", start + Duration::from_millis(token as u64));
        }
        assert_eq!(authorized.0.len(), REMEMBERED);
        assert!(authorized.contains(&(2 * REMEMBERED - 1).to_string(), "/metrics", start));
    }

    #[test]
    fn only_bearer_tokens_count() {
        for (value, token) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Bearer ", None),
            ("Bearer", None),
            ("Basic abc", None),
        ] {
            let request = Request::builder().header("Authorization", value).body(Body::empty()).expect("a request");
            assert_eq!(bearer(&request).as_deref(), token, "{value:?}");
        }
        assert_eq!(bearer(&Request::new(Body::empty())), None);
    }
}
