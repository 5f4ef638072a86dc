//! One measured process: what it says of its steps, and what the operating system says of it (Linux only: `/proc`).

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::machine;

/// Between two looks at a process's memory. The kernel keeps the peak, so a look misses only growth in the last moments.
const LOOK: Duration = Duration::from_millis(5);

/// Where a process writes its events, one JSON object a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Events {
    /// Workers and peers.
    Stdout,
    /// `hiper --log-format json`.
    Stderr,
}

/// What one process did.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Run {
    /// Seconds of each step after those that warm up: the first, or all that were timed together with it.
    pub seconds: Vec<f64>,
    /// Seconds from the command to the begin of the first step.
    pub start_up: f64,
    /// Peak resident memory, bytes (`VmHWM`).
    pub peak_bytes: f64,
    /// Seconds from the begin of the first step to the end of the last, if there were any.
    pub all_steps: Option<f64>,
    /// Peak memory of a card, bytes, where one was watched.
    pub card_bytes: Option<f64>,
    /// Pages that the system gave between the ends of two steps (minor faults), from the third step on.
    pub page_faults: Vec<f64>,
    /// What it said elsewhere than its events: hints and warnings.
    pub said: String,
    /// Other events, as they came, and `at`: seconds from the command to then.
    pub events: Vec<Value>,
}

impl Run {
    /// For the raw samples of a report.
    pub fn json(&self) -> Value {
        json!({
            "seconds": self.seconds, "start_up_seconds": self.start_up, "peak_bytes": self.peak_bytes,
            "all_steps_seconds": self.all_steps, "card_bytes": self.card_bytes, "page_faults_a_step": self.page_faults,
            "events": self.events,
        })
    }
}

/// A step as it was seen.
#[derive(Clone, Copy)]
struct Step {
    ended: f64,
    seconds: f64,
    faults: Option<u64>,
}

/// Runs `command` to its end, for which there may be no more `patience` than so much.
///
/// # Errors
/// When it cannot be started, fails, or takes too long; the error carries what it said.
pub fn watch(mut command: Command, events: Events, patience: Option<Duration>) -> Result<Run> {
    let what = format!("{command:?}");
    let said = tempfile::NamedTempFile::new()?;
    match events {
        Events::Stdout => command.stdout(Stdio::piped()).stderr(said.reopen()?),
        Events::Stderr => command.stdout(said.reopen()?).stderr(Stdio::piped()),
    };
    let [name, order] = machine::CARD_ORDER;
    command.env(name, order);
    let started = Instant::now();
    let mut child = command.stdin(Stdio::null()).spawn().with_context(|| what.clone())?;
    let proc = Path::new("/proc").join(child.id().to_string());
    let pipe: Box<dyn std::io::Read> = match events {
        Events::Stdout => Box::new(child.stdout.take().context("no standard output")?),
        Events::Stderr => Box::new(child.stderr.take().context("no standard error")?),
    };
    let (peak, ended, late) = (AtomicU64::new(0), AtomicBool::new(false), AtomicBool::new(false));
    let mut steps = Vec::new();
    let mut others = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let status = std::fs::read_to_string(proc.join("status")).unwrap_or_default();
                peak.fetch_max(peak_resident(&status).unwrap_or(0), Ordering::Relaxed);
                if patience.is_some_and(|patience| started.elapsed() > patience) {
                    late.store(true, Ordering::Relaxed);
                    // One that has just ended cannot be.
                    let _ = child.kill();
                    break;
                }
                std::thread::sleep(LOOK);
            }
        });
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let now = started.elapsed().as_secs_f64();
            let Ok(mut event) = serde_json::from_str::<Value>(&line) else { continue };
            match step_seconds(&event) {
                Some(seconds) => {
                    let stat = std::fs::read_to_string(proc.join("stat")).unwrap_or_default();
                    steps.push(Step { ended: now, seconds, faults: minor_faults(&stat) });
                }
                None => {
                    if let Some(event) = event.as_object_mut() {
                        event.insert("at".into(), json!(now));
                    }
                    others.push(event);
                }
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    let status = child.wait()?;
    let said = String::from_utf8_lossy(&std::fs::read(said.path())?).into_owned();
    if !status.success() {
        let why = match patience.filter(|_| late.into_inner()) {
            Some(patience) => format!("took longer than {} s", patience.as_secs_f64()),
            None => status.to_string(),
        };
        let said: Vec<&str> = said.lines().rev().take(8).collect();
        let events: Vec<String> = others.iter().rev().take(2).map(Value::to_string).collect();
        bail!(
            "{why}\n{what}\n{}\n{}",
            events.join("\n"),
            said.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    Ok(Run { said, ..summarise(&steps, peak.into_inner(), others) })
}

fn summarise(steps: &[Step], peak_bytes: u64, events: Vec<Value>) -> Run {
    // Steps that a program times together have one number, their mean. The first on a card have their recording in it.
    let warm = steps.iter().take_while(|step| step.seconds == steps[0].seconds).count();
    let faults =
        steps.windows(2).skip(1).filter_map(|w| Some(w[1].faults?.saturating_sub(w[0].faults?) as f64));
    let start_up = steps.first().map_or(0.0, |first| first.ended - first.seconds * warm as f64);
    Run {
        seconds: steps[warm..].iter().map(|step| step.seconds).collect(),
        start_up,
        peak_bytes: peak_bytes as f64,
        all_steps: steps.last().map(|last| last.ended - start_up),
        card_bytes: None,
        page_faults: faults.collect(),
        said: String::new(),
        events,
    }
}

/// Seconds of a step's event: `hiper`'s `step` and `sample`; workers and peers say `step`.
fn step_seconds(event: &Value) -> Option<f64> {
    matches!(event["event"].as_str(), Some("step" | "sample")).then(|| event["seconds"].as_f64())?
}

/// `VmHWM` of `/proc/PID/status`, in bytes.
fn peak_resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// `minflt` of `/proc/PID/stat`, the tenth field; the second is a name that may hold anything.
fn minor_faults(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(7)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read() {
        assert_eq!(peak_resident("Name:\thiper\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2048 * 1024));
        assert_eq!(peak_resident("Name:\tzombie\n"), None);
        assert_eq!(minor_faults("42 (a) b) S 1 42 42 0 -1 4194560 1234 0 5 0"), Some(1234));
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        assert!(minor_faults(&own).unwrap() > 0);
    }

    #[test]
    fn the_first_step_warms_up_and_start_up_ends_where_it_begins() {
        let step = |ended, seconds, faults| Step { ended, seconds, faults: Some(faults) };
        let steps = [step(5.0, 3.0, 900), step(7.0, 2.0, 990), step(9.0, 2.5, 1000), step(11.0, 2.0, 1003)];
        let run = summarise(&steps, 7, Vec::new());
        assert_eq!(run.seconds, [2.0, 2.5, 2.0]);
        assert_eq!((run.start_up, run.peak_bytes, run.all_steps), (2.0, 7.0, Some(9.0)));
        assert_eq!(run.page_faults, [10.0, 3.0]);
        assert!(summarise(&steps[..1], 7, Vec::new()).seconds.is_empty());
        assert_eq!(summarise(&[], 7, Vec::new()).all_steps, None);
    }

    #[test]
    fn steps_that_are_timed_together_warm_up_together() {
        // Of three steps, told at once at their end: recording took most of the first ones' time.
        let step = |ended, seconds| Step { ended, seconds, faults: None };
        let steps = [[step(8.0, 2.0); 3], [step(8.75, 0.25); 3]].concat();
        let run = summarise(&steps, 0, Vec::new());
        assert_eq!(run.seconds, [0.25; 3]);
        assert_eq!((run.start_up, run.all_steps), (2.0, Some(6.75)));
    }

    #[test]
    fn events_of_a_process_are_read_and_failures_told() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let step = r#"echo '{"event":"step","seconds":0.5}'; echo '{"event":"step","seconds":0.25}'"#;
        let script = format!(r#"{step}; echo noise; echo '{{"event":"x"}}'; echo hint >&2"#);
        let run = watch(shell(&script), Events::Stdout, None).unwrap();
        assert_eq!((run.seconds, run.events.len(), &*run.said), (vec![0.25], 1, "hint\n"));
        assert!(run.events[0]["at"].as_f64().unwrap() > 0.0);
        let error = watch(shell("echo broken >&2; exit 3"), Events::Stdout, None).unwrap_err().to_string();
        assert!(error.contains("broken"), "{error}");
        let patience = Some(Duration::from_millis(50));
        let error = watch(shell("exec sleep 60"), Events::Stdout, patience).unwrap_err().to_string();
        assert!(error.contains("longer than"), "{error}");
    }
}
