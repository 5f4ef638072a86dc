//! `cargo xtask bench --gpu`: HiPer steps and edits on an NVIDIA card, ours and PyTorch's in turn, in f16.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hiper_core::HiperFile;

use super::contest::{find, take_turns};
use super::end_to_end::{Figures, time};
use super::lab::{Lab, Personalize};
use super::table::{Limits, Row, Unit};

const OURS: &str = "hiper";
const EAGER: &str = "PyTorch eager";
/// With CUDA graphs.
const COMPILED: &str = "PyTorch compiled";
const ALONE: &str = "one subject";
const TOGETHER: &str = "8 subjects";

/// Steps take milliseconds here: so many are measured for each of `--steps`.
const STEPS: usize = 20;
/// Of a personalisation as the paper has it.
const LONG_RUN: usize = 1000;
/// Steps of an edit.
const SAMPLING_STEPS: usize = 50;
/// Steps after which a card's tail is compared with a CPU's.
const AGREEING_STEPS: usize = 50;
/// Edits of a process, of which the first warms up.
const PICTURES: usize = 4;
const SUBJECTS: usize = 8;

/// Measures all, and lets `save` have what there is after each measurement: a runner may stop us.
///
/// # Errors
/// When a process of ours fails.
pub fn measure(
    lab: &Lab<'_>,
    asked: bool,
    report: &Path,
    save: impl Fn(&Figures) -> Result<()>,
) -> Result<Figures> {
    let kernels = report.with_extension("kernels.tsv");
    let mut bench = Bench { lab, asked, kernels, figures: Figures::default() };
    lab.draw_photo(lab.args.size)?;
    for measurement in
        [Bench::step, Bench::long_run, Bench::kernels, Bench::edit, Bench::together, Bench::agreement]
    {
        measurement(&mut bench)?;
        save(&bench.figures)?;
    }
    Ok(bench.figures)
}

struct Bench<'a> {
    lab: &'a Lab<'a>,
    asked: bool,
    /// A table of a step's kernels.
    kernels: PathBuf,
    figures: Figures,
}

impl Bench<'_> {
    fn run(&self, steps: usize) -> Personalize {
        let (size, threads) = (self.lab.args.size, self.lab.args.threads());
        Personalize { size, memory: "fast", steps, threads, on_card: true }
    }

    /// Steps of a process: its share, and one to warm up.
    fn steps(&self) -> usize {
        (STEPS * self.lab.args.steps).div_ceil(self.lab.args.rounds) + 1
    }

    /// A figure with its limit; one number was asked for, as what must be and what to aim at.
    fn add(&mut self, row: Row, limit: Option<fn([f64; 2]) -> Limits>, most: f64) {
        let limits = limit.filter(|_| self.asked).map(|limit| limit([most; 2]));
        self.figures.rows.push(row.limits(limits));
    }

    fn step(&mut self) -> Result<()> {
        let (lab, size, steps) = (self.lab, self.lab.args.size, self.steps());
        let what = format!("HiPer step {size}²");
        let mut contestants = vec![lab.personalize(OURS, self.run(steps))];
        contestants.extend(lab.peer(EAGER, "personalize", size, steps));
        contestants.extend(lab.peer_with(COMPILED, "personalize", size, steps, &["--compile"]));
        let outcomes = take_turns(&what, &contestants, lab.args.rounds)?;
        let Some(ours) = find(&outcomes, OURS) else { bail!("no step was measured") };
        let (eager, compiled) = (find(&outcomes, EAGER), find(&outcomes, COMPILED));
        self.add(time(what.clone(), ours, eager), Some(Limits::RatioAtMost), 0.5);
        if compiled.is_some() {
            self.add(time(what.clone(), ours, compiled), Some(Limits::RatioAtMost), 1.0);
        }
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    fn long_run(&mut self) -> Result<()> {
        let what = format!("{LONG_RUN} steps {}²", self.lab.args.size);
        let outcomes = take_turns(&what, &[self.lab.personalize(OURS, self.run(LONG_RUN))], 1)?;
        let [ours] = outcomes.as_slice() else { bail!("no long run was measured") };
        let seconds = ours.runs.iter().map(|run| run.all_steps).sum();
        self.add(Row::new(what.clone(), Unit::Seconds, seconds), Some(Limits::AtMost), 20.0);
        self.add(Row::new(format!("{what}: start-up"), Unit::Seconds, ours.start_up()), None, 0.0);
        match ours.card_gigabytes() {
            Some(peak) => {
                let row = Row::new(format!("{what}: peak memory of the card"), Unit::Gigabytes, peak);
                self.add(row, Some(Limits::AtMost), 4.0);
            }
            None => eprintln!("memory of the card is left out: nvidia-smi does not tell it"),
        }
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    /// Each kernel of a step by itself, and the time of all of them: what a step has beside is its launches.
    fn kernels(&mut self) -> Result<()> {
        let what = format!("HiPer step {}²: its kernels one by one", self.lab.args.size);
        let timed = self.lab.personalize_timed(OURS, self.run(1), &self.kernels);
        let outcomes = take_turns(&what, &[timed], 1)?;
        let table =
            std::fs::read_to_string(&self.kernels).with_context(|| self.kernels.display().to_string())?;
        let seconds = sum_of_microseconds(&table) * 1e-6;
        self.add(Row::new(what.clone(), Unit::Seconds, seconds), None, 0.0);
        eprintln!("wrote {}", self.kernels.display());
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    /// Whole pictures with guidance, from the sentence to the file; the tail is the long run's.
    fn edit(&mut self) -> Result<()> {
        let (lab, size) = (self.lab, self.lab.args.size);
        let what = format!("edit of {SAMPLING_STEPS} steps {size}²");
        let mut contestants = vec![lab.edit(OURS, SAMPLING_STEPS, PICTURES)];
        contestants.extend(lab.peer(EAGER, "edit", size, PICTURES));
        contestants.extend(lab.peer_with(COMPILED, "edit", size, PICTURES, &["--compile"]));
        let mut outcomes = take_turns(&what, &contestants, lab.args.rounds)?;
        // A peer's step is a picture; ours are steps of the sampler, and pictures are files.
        for run in outcomes.iter_mut().filter(|outcome| outcome.name == OURS).flat_map(|ours| &mut ours.runs)
        {
            run.seconds = pictures(&run.events);
        }
        let Some(ours) = find(&outcomes, OURS) else { bail!("no edit was measured") };
        self.add(time(what.clone(), ours, find(&outcomes, EAGER)), Some(Limits::AtMost), 2.0);
        if let Some(compiled) = find(&outcomes, COMPILED) {
            self.add(time(what.clone(), ours, Some(compiled)), None, 0.0);
        }
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    fn together(&mut self) -> Result<()> {
        let (lab, size, run) = (self.lab, self.lab.args.size, self.run(self.steps()));
        let what = format!("HiPer step {size}² of {SUBJECTS} subjects, each");
        let contestants = [lab.personalize(ALONE, run), lab.personalize_together(TOGETHER, run, SUBJECTS)?];
        let outcomes = take_turns(&what, &contestants, lab.args.rounds)?;
        let [alone, together] = outcomes.as_slice() else { bail!("no batch was measured") };
        let each = |seconds: f64| seconds / SUBJECTS as f64;
        let row = Row::new(what.clone(), Unit::Seconds, each(together.seconds()));
        let row = row.against(ALONE, alone.seconds(), together.ratio_to(alone).map(each));
        self.add(row, Some(Limits::RatioAtMost), 0.6);
        self.figures.keep(&what, &outcomes);
        Ok(())
    }

    /// The tail after some steps on the card and on the CPU, in `f32`: photo, sentence and seed are the same.
    fn agreement(&mut self) -> Result<()> {
        let (lab, size) = (self.lab, self.lab.args.size);
        let what = format!("tail after {AGREEING_STEPS} steps {size}², against a CPU's");
        for on_card in [true, false] {
            let run = Personalize { on_card, ..self.run(AGREEING_STEPS) };
            lab.personalize(OURS, run).run().with_context(|| what.clone())?;
        }
        let distance = relative_distance(&lab.tail(true), &lab.tail(false))?;
        self.add(Row::new(what, Unit::Relative, distance), Some(Limits::AtMost), 2e-2);
        Ok(())
    }
}

/// `‖a − b‖ / ‖b‖` of two files' tails.
fn relative_distance(a: &Path, b: &Path) -> Result<f64> {
    let tail =
        |path: &Path| anyhow::Ok(HiperFile::load(path)?.tail.tensor().flatten_all()?.to_vec1::<f32>()?);
    let (a, b) = (tail(a)?, tail(b)?);
    let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let difference = squares(&mut a.iter().zip(&b).map(|(a, b)| a - b));
    Ok((difference / squares(&mut b.iter().copied())).sqrt())
}

/// Of a table's first column.
fn sum_of_microseconds(table: &str) -> f64 {
    table.lines().filter_map(|line| line.split('\t').next()?.parse::<f64>().ok()).sum()
}

/// Seconds between the files of pictures: of each but the first.
fn pictures(events: &[serde_json::Value]) -> Vec<f64> {
    let written = events.iter().filter(|event| event["event"] == "wrote" && event["what"] == "picture");
    let times: Vec<f64> = written.filter_map(|event| event["at"].as_f64()).collect();
    times.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use hiper_core::HiperEmbedding;
    use serde_json::json;

    #[test]
    fn tails_are_compared_by_their_distance() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, numbers: [[f32; 2]; 1]| {
            let tail = HiperEmbedding::new(Tensor::new(&numbers, &Device::Cpu).unwrap()).unwrap();
            let path = folder.path().join(name);
            HiperFile { tail, metadata: Default::default() }.save(&path).unwrap();
            path
        };
        let (a, b) = (write("a", [[3.0, 4.5]]), write("b", [[3.0, 4.0]]));
        assert_eq!(relative_distance(&a, &b).unwrap(), 0.1);
    }

    #[test]
    fn the_kernels_of_a_table_are_added_up() {
        assert_eq!(sum_of_microseconds("microseconds\tlaunches\n10.5\t3\n2.0\t1\n"), 12.5);
    }

    #[test]
    fn pictures_take_the_time_between_their_files() {
        let wrote = |what: &str, at: f64| json!({"event": "wrote", "what": what, "at": at});
        let events =
            [wrote("tail", 1.0), wrote("picture", 5.0), wrote("picture", 7.0), wrote("picture", 8.5)];
        assert_eq!(pictures(&events), [2.0, 1.5]);
        assert!(pictures(&events[..2]).is_empty());
    }
}
