//! Contestants that take turns, so that a machine whose speed drifts is as slow for one as for the other.

use std::process::Command;

use anyhow::Result;
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
    /// A peer that fails is left out; we may not.
    pub peer: bool,
    /// Whether it computes on a card, whose memory is watched.
    pub on_card: bool,
}

impl Contestant<'_> {
    /// Its process, once.
    ///
    /// # Errors
    /// As [`watch`].
    pub fn run(&self) -> Result<Run> {
        let memory = if self.on_card { CardMemory::watch() } else { None };
        let run = watch((self.command)(), self.events)?;
        Ok(Run { card_bytes: memory.and_then(CardMemory::peak), ..run })
    }
}

/// What a contestant did, a run a round.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Of the contestant.
    pub name: &'static str,
    /// In order.
    pub runs: Vec<Run>,
}

impl Outcome {
    /// The median step, seconds.
    pub fn seconds(&self) -> f64 {
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
    pub fn start_up(&self) -> f64 {
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

    fn over_all(&self, figures: impl Fn(&Run) -> Vec<f64>) -> f64 {
        median(&self.runs.iter().flat_map(figures).collect::<Vec<_>>()).unwrap_or(f64::NAN)
    }
}

/// Lets all take `rounds` turns: first, second, …, first, second, ….
///
/// # Errors
/// When one that is no peer fails.
pub fn take_turns(title: &str, contestants: &[Contestant<'_>], rounds: usize) -> Result<Vec<Outcome>> {
    let mut outcomes: Vec<Option<Outcome>> =
        contestants.iter().map(|c| Some(Outcome { name: c.name, runs: Vec::new() })).collect();
    for round in 1..=rounds {
        for (contestant, slot) in contestants.iter().zip(&mut outcomes) {
            let Some(outcome) = slot else { continue };
            match contestant.run() {
                Ok(run) => {
                    let step = median(&run.seconds).unwrap_or(f64::NAN);
                    eprintln!("{title}, round {round} of {rounds}: {} {step:.4} s", contestant.name);
                    outcome.runs.push(run);
                }
                Err(error) if contestant.peer => {
                    eprintln!("{title}: {} is left out: {error:#}", contestant.name);
                    *slot = None;
                }
                Err(error) => return Err(error.context(title.to_owned())),
            }
        }
    }
    Ok(outcomes.into_iter().flatten().collect())
}

/// The outcome of `name`.
pub fn find<'a>(outcomes: &'a [Outcome], name: &str) -> Option<&'a Outcome> {
    outcomes.iter().find(|outcome| outcome.name == name)
}

/// All samples, by contestant.
pub fn json(outcomes: &[Outcome]) -> Value {
    let runs = |outcome: &Outcome| outcome.runs.iter().map(Run::json).collect::<Value>();
    Value::Object(outcomes.iter().map(|outcome| (outcome.name.to_owned(), runs(outcome))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(name: &'static str, script: &'static str, peer: bool) -> Contestant<'static> {
        let command = Box::new(move || {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        });
        Contestant { name, command, events: Events::Stdout, peer, on_card: false }
    }

    #[test]
    fn a_failing_peer_is_left_out_and_failing_ourselves_is_an_error() {
        let ours = || says("ours", r#"echo '{"event":"step","seconds":2}'"#, false);
        let outcomes = take_turns("t", &[ours(), says("peer", "exit 1", true)], 2).unwrap();
        assert_eq!(outcomes.len(), 1);
        assert_eq!((outcomes[0].runs.len(), outcomes[0].seconds()), (2, 2.0));
        let peer = says("peer", r#"echo '{"event":"step","seconds":8}'"#, true);
        let outcomes = take_turns("t", &[ours(), peer], 3).unwrap();
        assert_eq!(outcomes[0].ratio_to(&outcomes[1]), Some(0.25));
        assert!(take_turns("t", &[says("ours", "exit 1", false)], 1).is_err());
    }
}
