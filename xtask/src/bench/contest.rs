//! Contestants that take turns, so that a machine whose speed drifts is as slow for one as for the other.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;

use super::card_memory::CardMemory;
use super::child::{Events, Run, watch};
use super::statistics::{median, median_ratio};

/// Who computes.
pub struct Contestant<'a> {
    /// As the report calls it.
    pub name: &'static str,
    /// Makes its process.
    pub command: Box<dyn Fn() -> Command + 'a>,
    /// Where the process tells.
    pub events: Events,
    /// A peer may fail; we may not.
    pub peer: bool,
    /// Whether it computes on a card, whose memory is watched.
    pub on_card: bool,
    /// How long a process may take.
    pub patience: Option<Duration>,
}

impl Contestant<'_> {
    /// Its process, once.
    ///
    /// # Errors
    /// As [`watch`].
    pub fn run(&self) -> Result<Run> {
        let memory = if self.on_card { CardMemory::watch() } else { None };
        let run = watch((self.command)(), self.events, self.patience)?;
        Ok(Run { card_bytes: memory.and_then(CardMemory::peak), ..run })
    }
}

/// What a contestant did, a run a round.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Of the contestant.
    pub name: &'static str,
    /// In order.
    pub runs: Vec<Run>,
    /// Why it takes no more turns.
    pub failure: Option<String>,
}

impl Outcome {
    /// Before the first turn.
    pub fn new(name: &'static str) -> Self {
        Self { name, ..Self::default() }
    }

    /// Lets the contestant run once more, and says how that went.
    pub fn take_turn(&mut self, title: &str, contestant: &Contestant<'_>) {
        match contestant.run() {
            Ok(run) => {
                let step = median(&run.seconds).map_or("done".into(), |step| format!("{step:.4} s"));
                eprintln!("{title}: {} {step}", contestant.name);
                self.runs.push(run);
            }
            Err(error) => {
                let then = if contestant.peer { "is left out" } else { "failed" };
                eprintln!("{title}: {} {then}: {error:#}", contestant.name);
                self.failure = Some(format!("{title}: {} {then}: {error:#}", contestant.name));
            }
        }
    }

    /// The median step, seconds.
    pub fn seconds(&self) -> Option<f64> {
        self.over_all(|run| run.seconds.clone())
    }

    /// The largest peak, 10⁹ bytes.
    pub fn peak_gigabytes(&self) -> f64 {
        self.runs.iter().map(|run| run.peak_bytes / 1e9).fold(0.0, f64::max)
    }

    /// The largest peak of a card's memory, 10⁹ bytes.
    pub fn card_gigabytes(&self) -> Option<f64> {
        self.runs.iter().filter_map(|run| run.card_bytes).map(|bytes| bytes / 1e9).reduce(f64::max)
    }

    /// The median start-up, seconds.
    pub fn start_up(&self) -> Option<f64> {
        self.over_all(|run| vec![run.start_up])
    }

    /// The median of pages asked for in a step; none when there were too few steps.
    pub fn page_faults(&self) -> Option<f64> {
        median(&self.runs.iter().flat_map(|run| run.page_faults.clone()).collect::<Vec<_>>())
    }

    /// Ratio of times, within rounds.
    pub fn ratio_to(&self, other: &Self) -> Option<f64> {
        let rounds = |outcome: &Self| outcome.runs.iter().map(|run| run.seconds.clone()).collect::<Vec<_>>();
        median_ratio(&rounds(self), &rounds(other))
    }

    /// All samples.
    pub fn json(&self) -> Value {
        self.runs.iter().map(Run::json).collect()
    }

    fn over_all(&self, figures: impl Fn(&Run) -> Vec<f64>) -> Option<f64> {
        median(&self.runs.iter().flat_map(figures).collect::<Vec<_>>())
    }
}

/// Lets all take `rounds` turns: first, second, …, first, second, …. A peer that fails has what it did in the rounds before.
///
/// # Errors
/// When one that is no peer fails.
pub fn take_turns(title: &str, contestants: &[Contestant<'_>], rounds: usize) -> Result<Vec<Outcome>> {
    let mut outcomes: Vec<Outcome> = contestants.iter().map(|c| Outcome::new(c.name)).collect();
    for round in 1..=rounds {
        let title = format!("{title}, round {round} of {rounds}");
        for (contestant, outcome) in contestants.iter().zip(&mut outcomes) {
            if outcome.failure.is_some() {
                continue;
            }
            outcome.take_turn(&title, contestant);
            match &outcome.failure {
                Some(failure) if !contestant.peer => bail!("{failure}"),
                _ => {}
            }
        }
    }
    outcomes.retain(|outcome| !outcome.runs.is_empty());
    Ok(outcomes)
}

/// The outcome of `name`.
pub fn find<'a>(outcomes: &'a [Outcome], name: &str) -> Option<&'a Outcome> {
    outcomes.iter().find(|outcome| outcome.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(name: &'static str, script: String, peer: bool) -> Contestant<'static> {
        let command = Box::new(move || {
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            command
        });
        Contestant { name, command, events: Events::Stdout, peer, on_card: false, patience: None }
    }

    #[test]
    fn a_failing_peer_is_left_out_and_failing_ourselves_is_an_error() {
        let warm = |then: &str| format!(r#"echo '{{"event":"step","seconds":9}}'; {then}"#);
        let step = |seconds: f64| warm(&format!(r#"echo '{{"event":"step","seconds":{seconds}}}'"#));
        let ours = || says("ours", step(2.0), false);
        let outcomes = take_turns("t", &[ours(), says("peer", "exit 1".into(), true)], 2).unwrap();
        assert_eq!(outcomes.len(), 1);
        assert_eq!((outcomes[0].runs.len(), outcomes[0].seconds()), (2, Some(2.0)));
        let outcomes = take_turns("t", &[ours(), says("peer", step(8.0), true)], 3).unwrap();
        assert_eq!(outcomes[0].ratio_to(&outcomes[1]), Some(0.25));
        assert!(take_turns("t", &[says("ours", "exit 1".into(), false)], 1).is_err());
    }

    #[test]
    fn a_peer_that_fails_later_has_its_earlier_rounds() {
        let folder = tempfile::tempdir().unwrap();
        let once = format!(r#"mkdir {}/once && echo '{{"event":"x"}}'"#, folder.path().display());
        let outcomes = take_turns("t", &[says("peer", once, true)], 3).unwrap();
        assert_eq!(outcomes[0].runs.len(), 1);
        assert!(outcomes[0].failure.as_deref().unwrap().starts_with("t, round 2 of 3: peer is left out"));
    }
}
