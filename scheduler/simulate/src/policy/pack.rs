//! Shoal's consolidation (`--mode pack`): see [`crate::pack`] for the rules.

use std::collections::HashMap;

use shoal_plan::{LaunchRequest, NodeName, VmId};

use super::{Balancer, Move, Observation, Orders};
use crate::model::Scenario;
use crate::pack::{self, Forecast};

/// Seconds between two looks at what could be emptied. Overload is looked at with every report.
const INTERVAL: f64 = 300.0;

/// Its state: a forecast per VM.
#[derive(Debug)]
pub(super) struct Pack {
    forecasts: HashMap<VmId, Forecast>,
    watts: Vec<f64>,
}

impl Pack {
    pub fn new(scenario: &Scenario) -> Self {
        Self {
            forecasts: HashMap::new(),
            // Of a full host, per unit of work: the better ones are filled first.
            watts: scenario
                .nodes
                .iter()
                .map(|node| node.power.watts(1.0) / node.capacity())
                .collect(),
        }
    }
}

impl Balancer for Pack {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        pack::place(seen, &self.forecasts, &self.watts, request)
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        let mut forecasts = HashMap::with_capacity(seen.snapshot.vms.len());
        for (vm, used) in seen.snapshot.vms.iter().zip(&seen.samples.vms) {
            let speed = seen
                .snapshot
                .nodes
                .iter()
                .find(|node| node.name == vm.node)
                .map_or(1.0, |node| node.speed);
            let mut forecast = self.forecasts.remove(&vm.id).unwrap_or_default();
            forecast.update(used * speed);
            forecasts.insert(vm.id.clone(), forecast);
        }
        self.forecasts = forecasts;
        let moves = pack::round(seen, &self.forecasts, &self.watts).into_iter();
        moves
            .map(|(vm, to)| Move::new(vm, to))
            .collect::<Vec<Move>>()
            .into()
    }

    fn interval(&self) -> f64 {
        INTERVAL
    }
}
