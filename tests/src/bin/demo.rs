//! What `make demo` shows: a Router at work on a WorkerPool, told in lines for a person.
#![expect(clippy::print_stdout, reason = "it is made to be read on a terminal")]
#![expect(clippy::indexing_slicing, reason = "a missing field of a JSON value is null")]

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use beamline_tests::router::{Key, Kind, Router, assignment, json};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use tokio::process::Command;

/// Slow work of the storm: long enough that a killed worker has some in its hands.
const STORM: usize = 200;
/// Several seconds of work for the whole pool.
const BACKLOG: usize = 4000;
/// A worker that is killed gives its work back after `ack_wait`, 10 s; the rest is for busy machines.
const PATIENCE: Duration = Duration::from_secs(90);

#[derive(Parser)]
struct Arguments {
    /// Where the Router publishes.
    #[arg(long)]
    nats_url: String,
    /// The HTTP server that assignments call, as workers see it.
    #[arg(long, default_value = "http://peer.beamline-demo.svc")]
    peer: String,
    #[command(subcommand)]
    scene: Scene,
}

#[derive(Subcommand)]
enum Scene {
    /// One assignment of every block, and some that fail in instructive ways.
    Blocks,
    /// Slow assignments of several tenants, with a command that breaks something in the middle.
    Storm {
        /// Run by the shell when a third has been answered.
        #[arg(long)]
        kill: Option<String>,
    },
    /// More work than the pool does at once, and how the queue drains.
    Backlog {
        /// Run by the shell every second; what it prints is shown.
        #[arg(long)]
        watch: Option<String>,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let demo = Demo { router: Router::connect(&arguments.nats_url).await, peer: arguments.peer, run: run_id() };
    match arguments.scene {
        Scene::Blocks => demo.blocks().await,
        Scene::Storm { kill } => demo.storm(kill.as_deref()).await,
        Scene::Backlog { watch } => demo.backlog(watch.as_deref()).await,
    }
}

/// Ids of one run must not meet the records of an earlier one.
fn run_id() -> String {
    jiff::Timestamp::now().as_millisecond().to_string()
}

struct Demo {
    router: Router,
    peer: String,
    run: String,
}

impl Demo {
    async fn blocks(&self) -> anyhow::Result<()> {
        let post = json!({"type": "http.request", "method": "POST", "url": format!("{}/echo", self.peer),
            "headers": {"Content-Type": "application/json"}, "body": "{\"input\":\"test\"}"});
        let query = json!({"type": "sql.query", "connection_string": "sqlite:///data/shop.sqlite",
            "query": "SELECT id, name FROM users WHERE id = ?", "parameters": [2]});
        self.tell("http.request", post).await;
        self.tell("fs.put", json!({"type": "fs.put", "path": "/data/hello.txt", "content": "Hello"})).await;
        self.tell("fs.get", json!({"type": "fs.get", "path": "/data/hello.txt"})).await;
        self.tell("fs.put", json!({"type": "fs.put", "path": "/data/shop.sqlite", "content_base64": shop()?})).await;
        self.tell("sql.query", query).await;
        self.tell("404 is final", json!({"type": "http.request", "url": format!("{}/status/404", self.peer)})).await;
        self.tell("not allowed", json!({"type": "fs.get", "path": "/data/../etc/passwd"})).await;
        self.tell("unknown block", json!({"type": "mail.send"})).await;
        Ok(())
    }

    /// Sends one assignment and prints what comes back.
    async fn tell(&self, name: &str, job: Value) {
        let key = self.submit(name, job).await;
        let verdict = self.router.verdict(&key).await;
        let accepted = verdict["status"] == "accepted";
        println!("  {name:<14} verdict  {}", one_line(&verdict, &["status", "error"]));
        let mut has_letter = !accepted;
        if accepted {
            let result = self.router.result(&key).await;
            has_letter = result["status"] == "error" && result["error"]["retryable"] == false;
            println!("  {:<14} result   {}", "", one_line(&result, &["status", "latency_ms", "result", "error"]));
        }
        if has_letter {
            let letter = self.router.letter(&key).await;
            println!("  {:<14} letter   {}", "", one_line(&letter, &["stage", "assignment"]));
        }
    }

    async fn storm(&self, kill: Option<&str>) -> anyhow::Result<()> {
        let keys = self.submit_many(STORM, "/slow/300").await;
        let third = keys.len() / 3;
        self.answered(&keys, third).await?;
        if let Some(command) = kill {
            println!("  {third} of {} answered; now: {command}", keys.len());
            let done = Command::new("sh").args(["-c", command]).output().await?;
            ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
        let started = Instant::now();
        self.answered(&keys, keys.len()).await?;
        println!("  all {} answered {:.1} s later; by worker:", keys.len(), started.elapsed().as_secs_f64());
        let mut workers: BTreeMap<String, usize> = BTreeMap::new();
        for key in &keys {
            let results = self.router.story(key).results;
            let record = self.router.record(key).await.with_context(|| format!("{key} has no record"))?;
            ensure!(results.iter().all(|result| *result == record.payload), "{key} has two outcomes");
            let worker = json(&record.payload)["metadata"]["worker_id"].as_str().unwrap_or_default().to_owned();
            *workers.entry(worker).or_default() += 1;
        }
        for (worker, answered) in workers {
            println!("    {answered:>4}  {worker}");
        }
        println!("  lost: 0, two outcomes: 0 (every id has one record, and every result is its bytes)");
        Ok(())
    }

    async fn backlog(&self, watch: Option<&str>) -> anyhow::Result<()> {
        let started = Instant::now();
        let keys = self.submit_many(BACKLOG, "/slow/50").await;
        let watching = async {
            while let Some(command) = watch {
                let shown = Command::new("sh").args(["-c", command]).output().await;
                let shown = shown.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
                println!("  {:>4.1} s  {}", started.elapsed().as_secs_f64(), shown.unwrap_or_default());
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answered = self.answered(&keys, keys.len()) => answered?,
            () = watching => {}
        }
        let seconds = started.elapsed().as_secs_f64();
        println!("  {} assignments answered in {seconds:.1} s ({:.0}/s)", keys.len(), keys.len() as f64 / seconds);
        Ok(())
    }

    async fn submit(&self, name: &str, job: Value) -> Key {
        let id = format!("demo-{}-{}", self.run, name.replace(' ', "-"));
        let assignment = assignment("acme", &format!("{id}-{}", self.router.submissions().len()), job);
        self.router.submit(&assignment).await;
        Key::from(&assignment)
    }

    async fn submit_many(&self, count: usize, path: &str) -> Vec<Key> {
        let url = format!("{}{path}", self.peer);
        let assignments = (0..count).map(|number| {
            let tenant = ["acme", "globex", "initech", "umbrella"][number % 4];
            let id = format!("demo-{}-{number}", self.run);
            assignment(tenant, &id, json!({"type": "http.request", "url": url}))
        });
        let assignments: Vec<_> = assignments.collect();
        futures::future::join_all(assignments.iter().map(|assignment| self.router.submit(assignment))).await;
        assignments.iter().map(Key::from).collect()
    }

    /// Waits until so many of them have a result.
    async fn answered(&self, keys: &[Key], count: usize) -> anyhow::Result<()> {
        let enough = async {
            while self.with_result(keys) < count {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let answered = tokio::time::timeout(PATIENCE, enough).await;
        answered.with_context(|| format!("fewer than {count} of {} were answered in {PATIENCE:?}", keys.len()))
    }

    fn with_result(&self, keys: &[Key]) -> usize {
        let heard = self.router.heard();
        let results = heard.iter().filter(|heard| heard.kind == Kind::Result);
        let answered: HashSet<_> = results.filter_map(|heard| heard.key.as_ref()).collect();
        keys.iter().filter(|key| answered.contains(key)).count()
    }
}

/// A small SQLite database, base64.
fn shop() -> anyhow::Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    let database = rusqlite::Connection::open(file.path())?;
    database.execute_batch(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL, email TEXT NOT NULL);
         INSERT INTO users VALUES (1, 'Ada', 'ada@example.com'), (2, 'John', 'john@example.com');",
    )?;
    database.close().map_err(|(_, error)| error)?;
    Ok(STANDARD.encode(std::fs::read(file.path())?))
}

/// These fields of a message, cut to fit a terminal.
fn one_line(message: &Value, fields: &[&str]) -> String {
    let present = fields.iter().filter(|field| !message[**field].is_null());
    let text = present.map(|field| format!("{field}={}", message[*field])).collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(150) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
