//! `cargo xtask bench --gpu`: HiPer steps and edits on an NVIDIA card, ours and PyTorch's in turn, in f16.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hiper_core::HiperFile;

use super::contest::{Contestant, Outcome};
use super::end_to_end::{Figures, time};
use super::lab::{Lab, Personalize};
use super::table::{Limits, Row, Unit};

const OURS: &str = "hiper";
const ON_CPU: &str = "hiper on the CPU";
const EAGER: &str = "PyTorch eager";
/// With CUDA graphs.
const COMPILED: &str = "PyTorch compiled";
/// With kernels chosen by trying them, too.
const TUNED: &str = "PyTorch compiled, max-autotune";

/// Steps that hiper takes on a card before it waits for it, and times together; peers too, so that none waits more often. The
/// first of them warm up.
const BLOCK: usize = 20;
/// [`BLOCK`] for the command of a peer.
const BLOCKS: [&str; 2] = ["--block", "20"];
/// What a step may take of a compiled one's time.
const OF_COMPILED: [f64; 2] = [1.0, 0.6];
/// Of a personalisation as the paper has it.
const LONG_RUN: usize = 1000;
/// Steps of an edit.
const SAMPLING_STEPS: usize = 50;
/// Steps after which a card's tail is compared with a CPU's.
const AGREEING_STEPS: usize = 50;
/// Edits of a process, of which the first warms up.
const PICTURES: usize = 4;
const SUBJECTS: usize = 8;

/// Lets the report have what there is.
type Save<'a> = dyn Fn(&Figures) -> Result<()> + 'a;

/// Measures all, ours on the card first, what takes longest last, and lets `save` have what there is after each process: a runner
/// may stop us. What fails is told in the figures, and the rest measured.
///
/// # Errors
/// When figures cannot be saved.
pub fn measure(lab: &Lab<'_>, asked: bool, report: &Path, save: &Save<'_>) -> Result<Figures> {
    let mut bench = Bench {
        lab,
        asked,
        report,
        save,
        figures: Figures::default(),
        step: Outcome::new(OURS),
        edit: Outcome::new(OURS),
    };
    lab.draw_photo(lab.args.size)?;
    if lab.python.is_none() {
        let why = "PyTorch is left out: $PEER_PYTHON names no Python with torch, diffusers and transformers";
        bench.figures.left_out.push(why.into());
        eprintln!("{why}");
    }
    for measurement in [
        Bench::step,
        Bench::long_run,
        Bench::edit,
        Bench::kernels,
        Bench::together,
        Bench::eager,
        Bench::compiled,
        Bench::agreement,
        Bench::tuned,
    ] {
        if let Err(error) = measurement(&mut bench) {
            eprintln!("{error:#}");
            bench.figures.failures.push(format!("{error:#}"));
        }
        save(&bench.figures)?;
    }
    Ok(bench.figures)
}

struct Bench<'a> {
    lab: &'a Lab<'a>,
    asked: bool,
    /// Other files are beside it.
    report: &'a Path,
    save: &'a Save<'a>,
    figures: Figures,
    /// Ours, which others are measured against.
    step: Outcome,
    edit: Outcome,
}

impl Bench<'_> {
    fn run(&self, steps: usize) -> Personalize {
        let (size, threads) = (self.lab.args.size, self.lab.args.threads());
        Personalize { size, memory: "fast", steps, threads, on_card: true }
    }

    /// Steps of a process: its share in whole blocks, and a block to warm up.
    fn steps(&self) -> usize {
        (self.lab.args.steps.div_ceil(self.lab.args.rounds) + 1) * BLOCK
    }

    /// Said at once too, should nobody let us come to the table.
    fn add(&mut self, row: Row, limits: Option<Limits>) {
        let row = row.limits(limits.filter(|_| self.asked));
        eprintln!("{row}");
        self.figures.rows.push(row);
    }

    /// All turns of a contestant, or those before it fails; saved after each.
    fn take_turns(&mut self, what: &str, contestant: &Contestant<'_>, rounds: usize) -> Result<Outcome> {
        let mut outcome = Outcome::new(contestant.name);
        for round in 1..=rounds {
            outcome.take_turn(&format!("{what}, round {round} of {rounds}"), contestant);
            self.figures.keep(what, std::slice::from_ref(&outcome));
            if let Some(failure) = outcome.failure.clone() {
                let figures = &mut self.figures;
                if contestant.peer { &mut figures.left_out } else { &mut figures.failures }.push(failure);
            }
            (self.save)(&self.figures)?;
            if outcome.failure.is_some() {
                break;
            }
        }
        Ok(outcome)
    }

    fn what_a_step_is(&self) -> String {
        format!("HiPer step {}²", self.lab.args.size)
    }

    fn what_an_edit_is(&self) -> String {
        format!("edit of {SAMPLING_STEPS} steps {}²", self.lab.args.size)
    }

    fn step(&mut self) -> Result<()> {
        let what = self.what_a_step_is();
        let ours = self.lab.personalize(OURS, self.run(self.steps()));
        self.step = self.take_turns(&what, &ours, self.lab.args.rounds)?;
        self.add(time(what, &self.step, None), None);
        Ok(())
    }

    fn long_run(&mut self) -> Result<()> {
        let what = format!("{LONG_RUN} steps {}²", self.lab.args.size);
        let ours = self.take_turns(&what, &self.lab.personalize(OURS, self.run(LONG_RUN)), 1)?;
        let seconds = ours.runs.first().and_then(|run| run.all_steps);
        self.add(Row::new(&*what, Unit::Seconds, seconds), Some(Limits::AtMost([20.0, 6.0])));
        self.add(Row::new(format!("{what}: start-up"), Unit::Seconds, ours.start_up()), None);
        let memory = format!("{what}: peak memory of the card");
        self.add(Row::new(memory, Unit::Gigabytes, ours.card_gigabytes()), Some(Limits::AtMost([4.0, 2.8])));
        Ok(())
    }

    /// Each kernel of a step by itself, and the time of all of them: what a step has beside is its launches.
    fn kernels(&mut self) -> Result<()> {
        let what = format!("{}: its kernels one by one", self.what_a_step_is());
        let path = self.beside("kernels.tsv");
        let timed = self.lab.personalize_timed(OURS, self.run(1), &path);
        if self.take_turns(&what, &timed, 1)?.failure.is_some() {
            return Ok(());
        }
        let table = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        self.add(Row::new(what, Unit::Seconds, sum_of_microseconds(&table) * 1e-6), None);
        eprintln!("wrote {}", path.display());
        Ok(())
    }

    /// Whole pictures with guidance, from the sentence to the file; the tail is the long run's.
    fn edit(&mut self) -> Result<()> {
        let what = self.what_an_edit_is();
        let ours = self.lab.edit(OURS, SAMPLING_STEPS, PICTURES);
        self.edit = self.take_turns(&what, &ours, self.lab.args.rounds)?;
        // Steps are the sampler's, and pictures are files.
        for run in &mut self.edit.runs {
            run.seconds = pictures(&run.events);
        }
        self.figures.keep(&what, std::slice::from_ref(&self.edit));
        self.add(time(what, &self.edit, None), Some(Limits::AtMost([2.0, 0.6])));
        Ok(())
    }

    fn together(&mut self) -> Result<()> {
        let what = format!("{} of {SUBJECTS} subjects, each", self.what_a_step_is());
        let all = self.lab.personalize_together(OURS, self.run(self.steps()), SUBJECTS)?;
        let all = self.take_turns(&what, &all, self.lab.args.rounds)?;
        let each = |seconds: f64| seconds / SUBJECTS as f64;
        let row = Row::new(what, Unit::Seconds, all.seconds().map(each));
        let row = row.against("one alone", self.step.seconds(), all.ratio_to(&self.step).map(each));
        self.add(row, Some(Limits::RatioAtMost([0.6, 0.4])));
        Ok(())
    }

    /// The tail after some steps on the card and on the CPU, in `f32`: photo, sentence and seed are the same.
    fn agreement(&mut self) -> Result<()> {
        let what = format!("tail after {AGREEING_STEPS} steps {}², against a CPU's", self.lab.args.size);
        let mut failed = false;
        for (name, on_card) in [(OURS, true), (ON_CPU, false)] {
            let run = Personalize { on_card, ..self.run(AGREEING_STEPS) };
            failed |= self.take_turns(&what, &self.lab.personalize(name, run), 1)?.failure.is_some();
        }
        let distance = (!failed).then(|| relative_distance(&self.lab.tail(true), &self.lab.tail(false)));
        let distance = distance.transpose();
        let row = Row::new(what, Unit::Relative, distance.as_ref().map_or(None, |distance| *distance));
        self.add(row, Some(Limits::AtMost([2e-2; 2])));
        distance.map(drop)
    }

    fn eager(&mut self) -> Result<()> {
        let [rounds, size] = [self.lab.args.rounds, self.lab.args.size];
        let limits = Limits::RatioAtMost([0.5, 0.2]);
        let eager = self.step_of(EAGER, &BLOCKS)?;
        self.add(eager, Some(limits));
        let what = self.what_an_edit_is();
        let edit = self.lab.peer(EAGER, "edit", size, PICTURES);
        let edit = edit.map(|edit| self.peers_turns(&what, &edit, rounds)).transpose()?;
        self.add(time(what, &self.edit, Some(&edit.unwrap_or(Outcome::new(EAGER)))), None);
        Ok(())
    }

    fn compiled(&mut self) -> Result<()> {
        let row = self.step_of(COMPILED, &[BLOCKS[0], BLOCKS[1], "--compile", "reduce-overhead"])?;
        self.add(row, Some(Limits::RatioAtMost(OF_COMPILED)));
        Ok(())
    }

    /// Trying kernels may take longer than we have: then there is no figure to be judged.
    fn tuned(&mut self) -> Result<()> {
        let row = self.step_of(TUNED, &[BLOCKS[0], BLOCKS[1], "--compile", "max-autotune"])?;
        let limits = row.ratio.map(|_| Limits::RatioAtMost(OF_COMPILED));
        self.add(row, limits);
        Ok(())
    }

    /// Ours beside a peer's, of which there may be none.
    fn step_of(&mut self, peer: &'static str, flags: &'static [&'static str]) -> Result<Row> {
        let what = self.what_a_step_is();
        let theirs = self.lab.peer_with(peer, "personalize", self.lab.args.size, self.steps(), flags);
        let theirs = theirs.map(|theirs| self.peers_turns(&what, &theirs, self.lab.args.rounds));
        let theirs = theirs.transpose()?.unwrap_or(Outcome::new(peer));
        Ok(time(what, &self.step, Some(&theirs)))
    }

    /// A peer's, and a file with its warnings.
    fn peers_turns(&mut self, what: &str, peer: &Contestant<'_>, rounds: usize) -> Result<Outcome> {
        let outcome = self.take_turns(what, peer, rounds)?;
        if outcome.runs.is_empty() {
            return Ok(outcome);
        }
        let said: String = outcome.runs.iter().map(|run| &*run.said).collect();
        let path = self.beside(&format!("{}.txt", file_name(&format!("{what} {}", peer.name))));
        std::fs::write(&path, said).with_context(|| path.display().to_string())?;
        Ok(outcome)
    }

    /// `bench.json` becomes `bench.` and what is asked for.
    fn beside(&self, extension: &str) -> PathBuf {
        self.report.with_extension(extension)
    }
}

/// Letters and digits, and hyphens between.
fn file_name(what: &str) -> String {
    let words = what.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
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
    fn files_are_named_after_what_is_measured() {
        assert_eq!(file_name("HiPer step 512² PyTorch eager"), "hiper-step-512-pytorch-eager");
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
