//! What is said of tenants: as they are now, and which budget of whom was used up last.

use beamline_crds::{Exceeded, TenantStatus, WorkerPoolStatus};
use jiff::{SignedDuration, Timestamp};

use crate::signals::Reading;
use crate::tenants::SHOWN;

/// So long after its window a budget is still said to have been used up.
const TOLD: SignedDuration = SignedDuration::from_hours(1);

/// The busiest, then those whose budget was used up within the hour. What cannot be known stays as it was.
pub(super) fn rows(before: &WorkerPoolStatus, reading: &Reading, now: Timestamp) -> Vec<TenantStatus> {
    let Some(tenants) = &reading.tenants else { return before.tenants.clone() };
    let is_told = |exceeded: &&Exceeded| now.duration_since(exceeded.until.0) < TOLD;
    let told = |id: &str| {
        let row = before.tenants.iter().find(|row| row.id == id)?;
        row.exceeded.as_ref().filter(is_told).cloned()
    };
    let mut rows = tenants.busiest.clone();
    for row in &mut rows {
        row.exceeded = row.exceeded.take().or_else(|| told(&row.id));
    }
    let is_gone = |row: &&TenantStatus| !tenants.busiest.iter().any(|one| one.id == row.id);
    for TenantStatus { id, executions_limit, cpu_time_ms_limit, .. } in before.tenants.iter().filter(is_gone) {
        let (id, exceeded) = (id.clone(), told(id));
        let (executions_limit, cpu_time_ms_limit) = (*executions_limit, *cpu_time_ms_limit);
        rows.extend(exceeded.is_some().then_some(TenantStatus {
            id,
            executions_limit,
            cpu_time_ms_limit,
            exceeded,
            ..TenantStatus::default()
        }));
    }
    rows.truncate(SHOWN);
    rows
}
