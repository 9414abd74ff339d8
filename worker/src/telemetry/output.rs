//! Takes whole lines and writes them from a thread of its own. A line never waits for whoever reads the output.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::IntCounter;

use super::LogFormat;
use super::lines;

/// Some ten thousand lines: a short pause of the reader loses nothing, a long one costs bounded memory.
const MAX_QUEUED_BYTES: usize = 4 * 1024 * 1024;
/// Between the first line and the write: under load one wake of the thread serves many lines.
const LINGER: Duration = Duration::from_millis(2);

/// Where lines go. Clones share it.
#[derive(Clone)]
pub(super) struct Output(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    dropped: IntCounter,
}

#[derive(Default)]
struct Queue {
    /// Whole lines.
    bytes: Vec<u8>,
    /// Lines that found no room since the last write.
    dropped: u64,
    /// Whether the thread holds bytes that it took from here.
    is_writing: bool,
}

impl Output {
    /// Starts the thread. It lives as long as the program, for the logs do.
    pub(super) fn start(
        sink: impl Write + Send + 'static,
        format: LogFormat,
        dropped: IntCounter,
    ) -> std::io::Result<Self> {
        let output = Self(Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new(), dropped }));
        let shared = Arc::clone(&output.0);
        std::thread::Builder::new().name("log-writer".to_owned()).spawn(move || shared.write_all_to(sink, format))?;
        Ok(output)
    }

    /// Queues a line, or drops and counts it when the queue is full.
    pub(super) fn push(&self, line: &[u8]) {
        let mut queue = self.0.queue();
        if queue.bytes.len().saturating_add(line.len()) > MAX_QUEUED_BYTES {
            queue.dropped += 1;
            drop(queue);
            self.0.dropped.inc();
            return;
        }
        // Else the thread is awake, and looks again before it sleeps.
        let is_asleep = queue.bytes.is_empty() && !queue.is_writing;
        queue.bytes.extend_from_slice(line);
        drop(queue);
        if is_asleep {
            self.0.changed.notify_all();
        }
    }

    /// Waits until all is written, but not for ever.
    pub(super) fn flush(&self, limit: Duration) {
        let has_work = |queue: &mut Queue| queue.is_writing || !queue.bytes.is_empty();
        let _ = self.0.changed.wait_timeout_while(self.0.queue(), limit, has_work);
    }
}

impl Shared {
    fn write_all_to(&self, mut sink: impl Write, format: LogFormat) {
        let mut taken = Vec::new();
        loop {
            let idle = |queue: &mut Queue| queue.bytes.is_empty();
            drop(self.changed.wait_while(self.queue(), idle).unwrap_or_else(PoisonError::into_inner));
            std::thread::sleep(LINGER);
            let mut queue = self.queue();
            std::mem::swap(&mut queue.bytes, &mut taken);
            let dropped = std::mem::take(&mut queue.dropped);
            queue.is_writing = true;
            drop(queue);
            if dropped > 0 {
                lines::dropped(format, dropped, &mut taken);
            }
            // There is nobody to tell that the output is gone; the lines are lost, the work goes on.
            let _ = sink.write_all(&taken).and_then(|()| sink.flush());
            taken.clear();
            self.queue().is_writing = false;
            self.changed.notify_all();
        }
    }

    /// A panic elsewhere leaves whole lines at worst, so a poisoned lock is as good as any.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, Sender};
    use std::time::Instant;

    use super::*;

    /// Takes nothing until it is let go.
    struct Stuck {
        go: Receiver<()>,
        written: Sender<String>,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.go.recv();
            self.written.send(String::from_utf8_lossy(bytes).into_owned()).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_reader_costs_lines_and_no_time() {
        let (go, waits) = mpsc::channel();
        let (written, lines) = mpsc::channel();
        let dropped = IntCounter::new("dropped", "dropped").unwrap();
        let output = Output::start(Stuck { go: waits, written }, LogFormat::Json, dropped.clone()).unwrap();
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        let started = Instant::now();
        for _ in 0..20_000 {
            output.push(&line);
        }
        output.flush(Duration::from_millis(50));
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        let lost = dropped.get();
        // What the thread had taken before it got stuck comes on top of the queue.
        assert!((20_000 - 2 * 4096..=20_000 - 4096).contains(&lost), "{lost}");

        drop(go);
        output.flush(Duration::from_secs(5));
        let written: String = lines.try_iter().collect();
        assert_eq!(written.lines().filter(|line| line.starts_with('x')).count() as u64, 20_000 - lost);
        // Each write notes the gap before it; there are two where the thread first looked when lines were lost already.
        let notes = written.lines().filter(|line| line.starts_with('{'));
        let counts =
            notes.map(|note| serde_json::from_str::<serde_json::Value>(note).unwrap()["fields"]["count"].as_u64());
        assert_eq!(counts.sum::<Option<u64>>(), Some(lost), "the gaps are noted");
    }

    #[test]
    fn lines_come_out_whole_and_in_order() {
        let (go, waits) = mpsc::channel();
        let (written, lines) = mpsc::channel();
        let dropped = IntCounter::new("dropped", "dropped").unwrap();
        let output = Output::start(Stuck { go: waits, written }, LogFormat::Text, dropped).unwrap();
        drop(go);
        (0..1000).for_each(|number| output.push(format!("{number}\n").as_bytes()));
        output.flush(Duration::from_secs(5));
        let expected: String = (0..1000).map(|number| format!("{number}\n")).collect();
        assert_eq!(lines.try_iter().collect::<String>(), expected);
    }
}
