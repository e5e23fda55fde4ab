//! The losses of a run so far, and their picture.

use std::path::Path;

use host::error::IoContext;
use host::{Error, Result};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use crate::checkpoint::files;

/// The file of a checkpoint, so that a resumed run's picture begins where the run did.
const FILE: &str = "losses.json";
const SIZE: (u32, u32) = (960, 540);
const BLUE: RGBColor = RGBColor(31, 119, 180);
const ORANGE: RGBColor = RGBColor(255, 127, 14);

/// Step and loss, of training and of validation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    pub training: Vec<(usize, f64)>,
    pub validation: Vec<(usize, f64)>,
}

impl Curve {
    /// The curve of a checkpoint; empty where it has none that can be read, since nothing but a picture needs it.
    pub fn read(dir: &Path) -> Self {
        std::fs::read(dir.join(FILE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    pub fn write(&self, dir: &Path) -> Result<()> {
        let bytes = serde_json::to_vec(self).map_err(|error| Error::bug("losses are not JSON").cause(error))?;
        files::write_bytes(&dir.join(FILE), &bytes)
    }

    pub fn push_training(&mut self, step: usize, loss: f64) {
        push(&mut self.training, step, loss);
    }

    pub fn push_validation(&mut self, step: usize, loss: f64) {
        push(&mut self.validation, step, loss);
    }

    /// Draws both as an SVG file; nothing where there is not one point.
    pub fn draw(&self, path: &Path) -> Result<()> {
        let floats = |points: &[(usize, f64)]| -> Vec<(f64, f64)> {
            points.iter().map(|(step, loss)| (*step as f64, *loss)).collect()
        };
        let (training, validation) = (floats(&self.training), floats(&self.validation));
        let all = || training.iter().chain(&validation);
        let Some(last) = all().map(|(step, _)| *step).reduce(f64::max) else { return Ok(()) };
        let (low, high) = all().fold((f64::MAX, f64::MIN), |(low, high), (_, loss)| (low.min(*loss), high.max(*loss)));
        let margin = ((high - low) * 0.05).max(1e-3);
        let mut svg = String::new();
        picture(&mut svg, &training, &validation, 0.0..last.max(1.0), low - margin..high + margin)
            .map_err(|error| Error::run(format!("cannot draw `{}`", path.display())).cause(error))?;
        // Under another name first: a reader never sees half a picture.
        let partial = path.with_extension("svg.partial");
        std::fs::write(&partial, svg).path_context("write", &partial)?;
        std::fs::rename(&partial, path).path_context("write", path)
    }
}

/// What is not a number is neither drawn nor JSON.
fn push(points: &mut Vec<(usize, f64)>, step: usize, loss: f64) {
    if loss.is_finite() {
        points.push((step, loss));
    }
}

fn picture(
    svg: &mut String,
    training: &[(f64, f64)],
    validation: &[(f64, f64)],
    steps: std::ops::Range<f64>,
    losses: std::ops::Range<f64>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(steps, losses)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .light_line_style(WHITE)
        .draw()?;
    let legend = |colour: RGBColor| move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2));
    if !training.is_empty() {
        let line = LineSeries::new(training.iter().copied(), BLUE.stroke_width(2));
        chart.draw_series(line)?.label("training").legend(legend(BLUE));
    }
    if !validation.is_empty() {
        let line = LineSeries::new(validation.iter().copied(), ORANGE.stroke_width(2)).point_size(3);
        chart.draw_series(line)?.label("validation").legend(legend(ORANGE));
    }
    // Losses fall: the upper right is free.
    let mut labels = chart.configure_series_labels();
    labels
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_a_point_for_each_loss() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        Curve::default().draw(&path).unwrap();
        assert!(!path.exists(), "nothing to draw");
        let mut curve = Curve { training: vec![], validation: vec![(0, 4.5), (41, 1.0)] };
        (1..=40).for_each(|step| curve.push_training(step, 4.0 / step as f64));
        curve.push_training(41, f64::NAN);
        curve.draw(&path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        let longest = svg.split("<polyline").map(|part| part.split("points=\"").nth(1).unwrap_or_default());
        let points = longest.map(|part| part.split('"').next().unwrap().split_whitespace().count()).max().unwrap();
        assert_eq!(points, 40);
        assert!(svg.contains("training") && svg.contains("validation") && svg.matches("<circle").count() == 2, "{svg}");
        assert_eq!(Curve::read(dir.path()), Curve::default());
        curve.write(dir.path()).unwrap();
        assert_eq!(Curve::read(dir.path()), curve);
    }
}
