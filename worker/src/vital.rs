//! The tasks on which everything rests: when one of them ends, however, the worker cannot go on.

use tokio::sync::mpsc;

use crate::failpoint;

/// Starts such tasks.
#[derive(Clone, Debug)]
pub struct Vital(mpsc::UnboundedSender<&'static str>);

/// Hears of those that have ended.
#[derive(Debug)]
pub struct Ended(mpsc::UnboundedReceiver<&'static str>);

/// Says which task it is when that has returned, panicked or been dropped.
struct LastWords {
    name: &'static str,
    ended: mpsc::UnboundedSender<&'static str>,
}

impl Vital {
    /// Whoever starts such tasks, and whoever hears of their ends.
    pub fn new() -> (Self, Ended) {
        let (ended, hears) = mpsc::unbounded_channel();
        (Self(ended), Ended(hears))
    }

    /// Starts a task; `name` says what it does.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.watched(name, task));
    }

    /// The same for a task that somebody else starts.
    pub fn watched(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let last_words = LastWords { name, ended: self.0.clone() };
        async move {
            let _last_words = last_words;
            failpoint::unless_it_ends(name, task).await;
        }
    }
}

impl Ended {
    /// The name of the next one that ends.
    pub async fn next(&mut self) -> &'static str {
        match self.0.recv().await {
            Some(name) => name,
            // Nobody is left who could start one.
            None => std::future::pending().await,
        }
    }
}

impl Drop for LastWords {
    fn drop(&mut self) {
        let _ = self.ended.send(self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_returns_or_panics_says_which_it_was() {
        let (vital, mut ended) = Vital::new();
        vital.spawn("goes on", std::future::pending());
        vital.spawn("returns", async {});
        assert_eq!(ended.next().await, "returns");
        vital.spawn("panics", async { panic!("a bug") });
        assert_eq!(ended.next().await, "panics");
    }
}
