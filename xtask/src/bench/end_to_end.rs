//! Whole steps and passes on a checkpoint, ours and the peers' in turn.

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use super::Group;
use super::child::Run;
use super::contest::{Outcome, find, take_turns};
use super::lab::{Lab, Personalize};
use super::statistics::{drift, median};
use super::table::{Limits, Row, Unit};

const FAST: &str = "hiper fast";
const LEAN: &str = "hiper lean";
const OURS: &str = "hiper";
const PYTORCH: &str = "PyTorch";
const OPENVINO: &str = "OpenVINO";

/// Steps at each end that [`drift`] compares.
const ENDS: usize = 5;

/// What is measured, gathered.
#[derive(Default)]
pub struct Figures {
    /// For the table.
    pub rows: Vec<Row>,
    /// Every sample, by measurement and contestant.
    pub samples: Map<String, Value>,
    /// What of ours failed.
    pub failures: Vec<String>,
    /// Peers that were not measured to the end, and why.
    pub left_out: Vec<String>,
}

impl Figures {
    /// A measurement's samples, in place of those of the same contestants.
    pub fn keep(&mut self, title: &str, outcomes: &[Outcome]) {
        let samples = self.samples.entry(title).or_insert_with(|| json!({}));
        for outcome in outcomes {
            samples[outcome.name] = outcome.json();
        }
    }
}

/// Measures `groups`; limits are shown where `asked` (they are for Stable Diffusion 1.5's shapes).
///
/// # Errors
/// When a process of ours fails.
pub fn measure(lab: &Lab<'_>, groups: &[Group], asked: bool) -> Result<Figures> {
    let mut bench = Bench { lab, asked, figures: Figures::default() };
    for group in groups {
        match group {
            Group::Operators => {}
            Group::Personalize => {
                bench.personalize(lab.args.size, true)?;
                bench.personalize(lab.args.small_size, false)?;
            }
            Group::Sample => bench.sample()?,
            Group::Unet => bench.unet()?,
            Group::Vae => {
                bench.vae("decode")?;
                bench.vae("encode")?;
            }
            Group::Scaling => bench.scaling()?,
            Group::Drift => bench.drift()?,
        }
    }
    Ok(bench.figures)
}

struct Bench<'a> {
    lab: &'a Lab<'a>,
    asked: bool,
    figures: Figures,
}

impl Bench<'_> {
    /// Steps of a process: its share of `--steps`, and one to warm up.
    fn steps(&self) -> usize {
        self.lab.args.steps.div_ceil(self.lab.args.rounds) + 1
    }

    fn limits(&self, limits: Limits) -> Option<Limits> {
        self.asked.then_some(limits)
    }

    fn add(&mut self, row: Row) {
        self.figures.rows.push(row);
    }

    fn run(&self, size: usize, memory: &'static str) -> Personalize {
        let (steps, threads) = (self.steps(), self.lab.args.threads());
        Personalize { size, memory, steps, threads, on_card: false }
    }

    /// Fast, PyTorch and lean in turn. Memory and start-up are asked at the large size.
    fn personalize(&mut self, size: usize, large: bool) -> Result<()> {
        let (lab, title) = (self.lab, format!("personalize {size}²"));
        lab.draw_photo(size)?;
        let mut contestants = vec![lab.personalize(FAST, self.run(size, "fast"))];
        contestants.extend(lab.peer(PYTORCH, "personalize", size, self.steps()));
        contestants.push(lab.personalize(LEAN, self.run(size, "lean")));
        let outcomes = take_turns(&title, &contestants, lab.args.rounds)?;
        let pytorch = find(&outcomes, PYTORCH);
        for (mode, ratio, peak) in [(FAST, [0.75, 0.5], [6.5, 4.5]), (LEAN, [1.0, 0.75], [3.0, 2.3])] {
            let Some(ours) = find(&outcomes, mode) else { continue };
            let asked = |when: bool, limits| if when { self.limits(limits) } else { None };
            let (ratio, peak) = (Limits::RatioAtMost(ratio), Limits::AtMost(peak));
            let (ratio, peak) = (asked(large || mode == FAST, ratio), asked(large, peak));
            let start_up = asked(large, Limits::AtMost([10.0, 4.0]));
            self.add(time(format!("{mode}: HiPer step {size}²"), ours, pytorch).limits(ratio));
            self.add(peak_memory(format!("{mode}: peak memory {size}²"), ours, pytorch).limits(peak));
            let row = Row::new(format!("{mode}: start-up {size}²"), Unit::Seconds, ours.start_up());
            self.add(row.limits(start_up));
            if let Some(faults) = ours.page_faults() {
                self.add(Row::new(format!("{mode}: new pages a step {size}²"), Unit::Plain, faults));
            }
        }
        self.figures.keep(&title, &outcomes);
        Ok(())
    }

    /// `hiper edit`, which needs a tail of this checkpoint first.
    fn sample(&mut self) -> Result<()> {
        let (lab, size, steps) = (self.lab, self.lab.args.size, self.steps());
        lab.draw_photo(lab.args.small_size)?;
        let tail = Personalize { steps: 1, ..self.run(lab.args.small_size, "fast") };
        let tail = lab.personalize(FAST, tail);
        tail.run()?;
        let mut contestants = vec![lab.edit(OURS, steps, 1)];
        contestants.extend(lab.peer(PYTORCH, "sample", size, steps));
        let what = format!("sampling step with guidance {size}²");
        let outcomes = take_turns(&what, &contestants, lab.args.rounds)?;
        let Some(ours) = find(&outcomes, OURS) else { bail!("no sampling step was measured") };
        let limits = self.limits(Limits::RatioAtMost([0.75, 0.5]));
        self.add(time(what.clone(), ours, find(&outcomes, PYTORCH)).limits(limits));
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    /// One forward pass. OpenVINO converts once, ahead.
    fn unet(&mut self) -> Result<()> {
        let (lab, size, steps) = (self.lab, self.lab.args.size, self.steps());
        let mut contestants = vec![lab.worker(OURS, "unet", steps)];
        contestants.extend(lab.peer(PYTORCH, "unet", size, steps));
        if let Some(export) = lab.peer(OPENVINO, "openvino-export", size, steps) {
            match export.run() {
                Ok(_) => contestants.extend(lab.peer(OPENVINO, "openvino", size, steps)),
                Err(error) => eprintln!("OpenVINO is left out: {error:#}"),
            }
        }
        let what = format!("UNet forward {size}²");
        let outcomes = take_turns(&what, &contestants, lab.args.rounds)?;
        let Some(ours) = find(&outcomes, OURS) else { bail!("no forward pass was measured") };
        let openvino = find(&outcomes, OPENVINO);
        self.add(time(what.clone(), ours, openvino).limits(self.limits(Limits::RatioAtMost([1.0, 0.65]))));
        if let Some(pytorch) = find(&outcomes, PYTORCH) {
            self.add(time(what.clone(), ours, Some(pytorch)));
        }
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    fn vae(&mut self, part: &'static str) -> Result<()> {
        let (lab, size, steps) = (self.lab, self.lab.args.size, self.steps());
        let mut contestants = vec![lab.worker(OURS, part, steps)];
        contestants.extend(lab.peer(PYTORCH, part, size, steps));
        let what = format!("VAE {part} {size}²");
        let outcomes = take_turns(&what, &contestants, lab.args.rounds)?;
        let Some(ours) = find(&outcomes, OURS) else { bail!("the VAE was not measured") };
        let (pytorch, limits) = (find(&outcomes, PYTORCH), self.limits(Limits::RatioAtMost([1.0, 0.5])));
        self.add(time(what.clone(), ours, pytorch).limits(limits));
        self.add(peak_memory(format!("{what}: peak memory"), ours, pytorch).limits(limits));
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    /// One thread against two.
    fn scaling(&mut self) -> Result<()> {
        let (lab, size) = (self.lab, self.lab.args.size);
        lab.draw_photo(size)?;
        let run = |threads| Personalize { threads, ..self.run(size, "fast") };
        let contestants = [lab.personalize("2 threads", run(2)), lab.personalize("1 thread", run(1))];
        let what = format!("HiPer step {size}², 1 → 2 threads");
        let outcomes = take_turns(&what, &contestants, lab.args.rounds)?;
        let [two, one] = outcomes.as_slice() else { bail!("scaling was not measured") };
        let row = Row::new(what.clone(), Unit::Seconds, two.seconds());
        let row = row.against(one.name, one.seconds(), one.ratio_to(two));
        self.add(row.limits(self.limits(Limits::RatioAtLeast([1.8, 1.95]))));
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    /// All `--steps` in one process: whether time drifts, and whether pages are still asked for.
    fn drift(&mut self) -> Result<()> {
        let (lab, size) = (self.lab, self.lab.args.small_size);
        lab.draw_photo(size)?;
        let run = Personalize { steps: lab.args.steps + 1, ..self.run(size, "fast") };
        let run: Run = {
            let contestant = lab.personalize(FAST, run);
            contestant.run()?
        };
        let steps = run.seconds.len();
        let Some(ratio) = drift(&run.seconds, ENDS) else {
            eprintln!("drift needs --steps {}", 2 * ENDS);
            return Ok(());
        };
        self.add(Row::new(
            format!("last {ENDS} of {steps} steps {size}² over the first {ENDS}"),
            Unit::Plain,
            ratio,
        ));
        if let Some(faults) = median(&run.page_faults) {
            self.add(Row::new(format!("new pages a step {size}² over {steps} steps"), Unit::Plain, faults));
        }
        self.figures.samples.insert("drift".into(), run.json());
        Ok(())
    }
}

/// A row of times beside a peer's.
pub fn time(what: String, ours: &Outcome, peer: Option<&Outcome>) -> Row {
    let row = Row::new(what, Unit::Seconds, ours.seconds());
    match peer {
        Some(peer) => row.against(peer.name, peer.seconds(), ours.ratio_to(peer)),
        None => row,
    }
}

fn peak_memory(what: String, ours: &Outcome, peer: Option<&Outcome>) -> Row {
    let bytes = ours.peak_gigabytes();
    let row = Row::new(what, Unit::Gigabytes, bytes);
    match peer.map(|peer| (peer.name, peer.peak_gigabytes())) {
        Some((name, theirs)) => row.against(name, theirs, Some(bytes / theirs)),
        None => row,
    }
}
