//! The one way in which tests wait: for a condition, up to a deadline, saying what was missing at the end.

use std::time::Duration;

use anyhow::{Result, anyhow};

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Calls `probe` until it succeeds and returns what it found.
///
/// The error of an unsuccessful probe describes the state that it saw. When `within` has passed, the last of those
/// becomes the cause of this function's error, which names `what` was waited for. A probe that hangs counts as well.
pub async fn eventually<T, F, Fut>(within: Duration, what: &str, mut probe: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let mut last = None;
    let attempts = async {
        let mut pause = FIRST_PAUSE;
        loop {
            match probe().await {
                Ok(found) => return found,
                Err(state) => last = Some(state),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    };
    if let Ok(found) = tokio::time::timeout(within, attempts).await {
        return Ok(found);
    }
    let last = last.unwrap_or_else(|| anyhow!("the first look did not come back"));
    Err(last.context(format!("waited {within:?} for {what}")))
}

/// Calls `probe` over and over for the whole of `span` and fails as soon as it fails once.
pub async fn throughout<F, Fut>(span: Duration, what: &str, mut probe: F) -> Result<()>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let looks = async {
        loop {
            if let Err(state) = probe().await {
                return state;
            }
            tokio::time::sleep(LONGEST_PAUSE).await;
        }
    };
    match tokio::time::timeout(span, looks).await {
        Ok(state) => Err(state.context(format!("{what} should have held for {span:?}"))),
        Err(_passed) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_that_fails_says_what_was_missing_and_what_was_seen_last() {
        let outcome: Result<()> = eventually(Duration::from_millis(50), "the kettle", || async {
            Err(anyhow!("still cold"))
        })
        .await;
        assert_eq!(
            format!("{:#}", outcome.unwrap_err()),
            "waited 50ms for the kettle: still cold"
        );
    }

    #[tokio::test]
    async fn a_probe_that_hangs_does_not_hang_the_wait() {
        let outcome: Result<()> =
            eventually(Duration::from_millis(20), "an answer", std::future::pending).await;
        assert!(format!("{:#}", outcome.unwrap_err()).contains("the first look did not come back"));
    }

    #[tokio::test]
    async fn what_breaks_once_did_not_hold_throughout() {
        let mut looks = 0;
        let outcome = throughout(Duration::from_secs(5), "silence", || {
            looks += 1;
            let quiet = looks < 3;
            async move { if quiet { Ok(()) } else { Err(anyhow!("a sound")) } }
        })
        .await;
        assert_eq!(
            format!("{:#}", outcome.unwrap_err()),
            "silence should have held for 5s: a sound"
        );
    }
}
