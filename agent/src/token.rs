//! The bearer token in a file.
//!
//! Owns: reading it anew for every request. kube's own layer goes on with a token for up to a minute after it was replaced,
//! which is longer than a lease: an agent whose old token is refused would stop its jobs. Must not: log it.

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request};
use std::path::{Path, PathBuf};
use tower::util::MapRequestLayer;

fn header(path: &Path) -> Result<HeaderValue, String> {
    let token = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let bearer = format!("Bearer {}", token.trim());
    let mut value = HeaderValue::from_str(&bearer).map_err(|error| error.to_string())?;
    value.set_sensitive(true);
    Ok(value)
}

/// Puts the token of that file on each request; the API server names what is wrong with a request that has none.
pub(crate) fn from_file<B>(path: PathBuf) -> MapRequestLayer<impl Fn(Request<B>) -> Request<B> + Clone> {
    MapRequestLayer::new(move |mut request: Request<B>| {
        match header(&path) {
            Ok(value) => drop(request.headers_mut().insert(AUTHORIZATION, value)),
            Err(error) => tracing::error!(error, path = %path.display(), "the token can't be read"),
        }
        request
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tower::{Layer as _, Service as _, ServiceExt as _};

    #[tokio::test]
    async fn each_request_carries_the_token_that_the_file_holds_then() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let echo = tower::service_fn(|request: Request<()>| async move {
            Ok::<_, std::convert::Infallible>(request.headers().get(AUTHORIZATION).cloned())
        });
        let mut service = from_file(file.path().to_owned()).layer(echo);
        for token in ["first\n", "second"] {
            std::fs::write(file.path(), token).unwrap();
            let sent = service
                .ready()
                .await
                .unwrap()
                .call(Request::new(()))
                .await
                .unwrap()
                .unwrap();
            assert_eq!(sent.to_str().unwrap(), format!("Bearer {}", token.trim()));
            assert!(sent.is_sensitive());
        }
    }
}
